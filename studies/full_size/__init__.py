"""What export and build cost at full size: ``python -m studies.full_size``."""
