"""``python -m studies.precision``: the error of each precision, measured without GPU and checkpoint."""
