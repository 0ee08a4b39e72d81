"""What engines cost in time, memory and energy, beside PyTorch in the same run: what ``wan-trt bench`` measures."""
