"""``python -m ett.cli``, as `torchrun` needs it."""

import sys

from ett.cli import main

if __name__ == "__main__":
    sys.exit(main())
