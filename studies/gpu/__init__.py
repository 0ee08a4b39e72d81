"""What can only be measured on a GPU, stage by stage: ``python -m studies.gpu``."""
