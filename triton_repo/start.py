"""The first process of a container: remove the previous container's leftovers, start the server, and end with it.

``python3 -m triton_repo.start PREFIX COMMAND...``. A pod's shared memory and temporary folder outlive its containers.
SIGTERM lets the running job finish. If a model dies, the container ends within seconds, so that Kubernetes restarts it.
Standard library only.
"""

import os
import signal
import sys
import time

from triton_repo.probe import DRAIN_FLAG
from triton_repo.process import end_group, models_of, start_group, stop_group
from triton_repo.server_folder import close_regions, remove_regions, server_folder

FOREVER_S = 10.0 * 365 * 86_400  # the server has its own exit timeout
WATCH_EVERY_S = 1.0


def main() -> int:
    _, prefix, *command = sys.argv
    remove_regions(prefix)
    DRAIN_FLAG.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server_folder(prefix) as (folder, lock):
        process, models = start_group(command, os.environ, folder, lock), models_of(folder)
        try:
            while process.poll() is None:
                if dead := models.dead():
                    print(f"the process of model {', '.join(dead)} has died; ending the server", file=sys.stderr)
                    return 1
                close_regions(prefix)
                time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            stop_group(process, models, FOREVER_S)
            return 0
        finally:
            end_group(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main())
