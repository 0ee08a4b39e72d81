"""The old name of ``python -m studies.gpu``."""

import sys

from wan22.errors import UserError

if __name__ == "__main__":
    remedy = "run it in a checkout of the source"
    print(f"gpu_run: {UserError('validate.gpu_run has moved', 'python -m studies.gpu', remedy)}", file=sys.stderr)
    sys.exit(2)
