"""The first process of a container: clears away what a killed server left in shared memory, then becomes the server.

``python3 -m triton_repo.start PREFIX COMMAND...``. A container that is started again finds the memory of the one before
it, as ``/dev/shm`` belongs to the pod. Standard library only.
"""

import os
import sys
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def remove_regions(prefix: str) -> None:
    """Shared memory that a killed server or stub left behind."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def main() -> None:
    _, prefix, *command = sys.argv
    remove_regions(prefix)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
