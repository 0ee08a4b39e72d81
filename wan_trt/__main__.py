"""The ``wan-trt`` program, also as ``python -m wan_trt``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while its modules load ends it with a line too."""
    try:
        from wan_trt.cli import main as run
    except KeyboardInterrupt:
        print("wan-trt: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
