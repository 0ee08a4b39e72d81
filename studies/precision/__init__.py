"""What each precision costs in accuracy, without GPU and checkpoint: ``wan-trt validate --precision-study``."""

from studies.precision.run import StudyOptions, precision_study

__all__ = ["StudyOptions", "precision_study"]
