"""`python -m crosspoint` is the `crosspoint` command."""

import sys

from crosspoint.cli import main

if __name__ == "__main__":
    sys.exit(main())
