"""Calibration: where observations come from, and what is measured on them."""
