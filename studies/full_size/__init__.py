"""``python -m studies.full_size``: time and memory of export and build at full size."""
