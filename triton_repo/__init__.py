"""Engine bundles behind Triton Inference Server: model repository, server process, client, Kubernetes manifests.

One decoupled Python model, the owner, opens the engines in its process and runs one job at a time. Triton provides the
queue, priorities and cancellation. A repository's ``model.py`` only imports :mod:`triton_repo.owner`.
"""
