"""The PyTorch side of a validation: diffusers, transformers and the official code."""
