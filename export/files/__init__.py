"""Weight files read and written tensor by tensor: safetensors, ``.pth``, direct I/O, resumable bundles."""
