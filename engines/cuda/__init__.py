"""Graphs for ONNX Runtime's CUDA provider: its fused operators, and proof that it has a kernel for every node."""
