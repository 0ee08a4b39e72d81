"""Engine bundles behind Triton Inference Server: model repository, server process, client, Kubernetes manifests.

One decoupled Python model, the owner, opens the engines in its own process and runs one job at a time; the queue,
priorities and cancellation are Triton's. ``model.py`` in a repository is a line that imports :mod:`triton_repo.owner`.
"""
