"""Evaluation: scores per subject volume and modality combination, with tables and figures."""
