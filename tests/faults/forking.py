"""A process that runs command lines in forks of itself, so that none has to import: ``python -m tests.faults.forking``.

Reads one JSON object a line: ``argv``, ``log`` (a file for all that is printed), and for a disk that fails ``below``
(a folder), ``from`` and ``to`` (the numbers of the calls that fail), ``errno`` and ``only_writes``. Answers with two
lines: the fork's process id when it begins, and ``[status, calls]`` when it has ended: what ``waitpid`` says, and how
many calls were counted, -1 after a kill.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Imports what commands import, then serves."""
    import av  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401

    import wan_trt.cli  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        counted, counts = os.pipe()
        if not (child := os.fork()):
            run(asked, counts)
        os.close(counts)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        calls = os.read(counted, 64)
        os.close(counted)
        print(json.dumps([status, int(calls or b"-1")]), flush=True)


def run(asked: dict[str, Any], counts: int) -> None:
    """One command line, in a group of its own; never returns."""
    from wan_trt.cli import main as wan_trt

    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["wan-trt", *asked["argv"]]
    tempfile.tempdir = asked.get("tmp")
    if "below" in asked:
        where, what = os.fsencode(asked["below"]), (asked["errno"], asked["only_writes"])
        disk().fail_below(where, ctypes.c_long(asked["from"]), ctypes.c_long(asked["to"]), *what)
    code = 1
    try:
        os.setpgid(0, 0)  # who is to end it finds it from here on
        wan_trt()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if "below" in asked:
            os.write(counts, str(disk().calls_below()).encode())
        os._exit(code)


def disk() -> ctypes.CDLL:
    """The library that ``LD_PRELOAD`` names."""
    library = ctypes.CDLL(str(Path(os.environ["LD_PRELOAD"])))
    library.calls_below.restype = ctypes.c_long
    return library


if __name__ == "__main__":
    main()
