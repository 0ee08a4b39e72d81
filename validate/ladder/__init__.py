"""The parity ladder: both sides of a comparison, its rows, metrics and limits."""
