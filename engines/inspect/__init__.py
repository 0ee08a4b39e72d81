"""Fusion reports: the kernels that the compiler made, read from its log."""
