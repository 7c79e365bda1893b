"""The command line: arguments in, one library call, its answer out. No logic of its own.

Results go to standard output, everything else to standard error. Nothing here imports torch until
a command needs it, so that `rightbatch --help` is instant.
"""

from rightbatch.cli.entry import main, run_and_exit

__all__ = ["main", "run_and_exit"]
