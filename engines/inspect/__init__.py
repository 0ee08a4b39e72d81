"""Fusion reports: the kernels that the compiler generated, read from its log."""
