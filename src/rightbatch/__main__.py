"""`python -m rightbatch` is the command line."""

import sys

from rightbatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
