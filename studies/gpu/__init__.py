"""``python -m studies.gpu``: measurements that need a GPU, in stages."""
