"""Graph passes for target cpu: what ONNX Runtime has one kernel for becomes one operator. Transformers in fp32 only."""
