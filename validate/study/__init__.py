"""What each precision costs in accuracy, without GPU and checkpoint: ``wan-trt validate --precision-study``."""

from validate.study.run import StudyOptions, precision_study

__all__ = ["StudyOptions", "precision_study"]
