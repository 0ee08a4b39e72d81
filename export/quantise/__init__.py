"""Matrices in FP8, INT8 and NVFP4, and what is measured of the inputs that they multiply."""
