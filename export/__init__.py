"""Checkpoint to ONNX. The only stage that builds graphs, and with validation the only one that may load PyTorch."""
