"""``wan-trt bench``: time, memory and energy of engines, compared with PyTorch in the same run."""
