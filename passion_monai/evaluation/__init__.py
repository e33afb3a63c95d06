"""How good a prediction is: scores per subject volume and modality combination, their tables and their figures."""
