"""ONNX to engines for one target."""
