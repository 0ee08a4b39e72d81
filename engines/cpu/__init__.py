"""Graph passes for target cpu, fp32 only: replace subgraphs for which ONNX Runtime has one kernel by one operator."""
