"""What each precision costs in accuracy, without GPU and checkpoint: ``python -m studies.precision``."""
