"""FP8 weights, static input scales and input means."""
