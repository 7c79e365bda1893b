"""The command: what it says, and that an error is a sentence and an exit code."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/regret.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_help_names_the_three_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("truth", "score", "table"))


def test_an_error_is_a_sentence_and_an_exit_code() -> None:
    done = run("score", "no-such-workload")
    assert done.returncode == 2
    assert done.stderr.startswith("There is no built-in workload 'no-such-workload'")
    assert "Traceback" not in done.stderr
