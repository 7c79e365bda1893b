"""`python -m rightbatch` is the command line."""

from rightbatch.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
