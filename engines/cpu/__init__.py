"""Graph passes for target cpu: what ONNX Runtime has one kernel for becomes one operator. In fp32 only."""
