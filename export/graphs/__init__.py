"""The ONNX graphs of every component, authored operator by operator, and the weights files they point into."""
