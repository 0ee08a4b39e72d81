"""LoRA files, and their merge into the weights while these stream."""
