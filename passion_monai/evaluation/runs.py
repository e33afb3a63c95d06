"""Where configurations of earlier versions find what is in :mod:`passion_monai.run_record` now."""

from passion_monai.run_record import trained_settings, write_run

__all__ = ["trained_settings", "write_run"]
