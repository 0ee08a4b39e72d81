"""What every stage shares: model specs, bundles, errors. Numpy at most."""
