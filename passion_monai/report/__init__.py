"""Compares runs: `python -m passion_monai.report RUN [RUN ...]` writes a page, with tables, tests and figures."""
