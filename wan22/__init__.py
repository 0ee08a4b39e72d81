"""Shared by all stages: model specs, bundles, errors. Imports numpy at most."""
