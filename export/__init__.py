"""Checkpoint to ONNX: the only stage that builds graphs. Only this stage and validation may load PyTorch."""
