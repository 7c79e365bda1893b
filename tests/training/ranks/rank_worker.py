"""One of several processes that a test talks to: it calls what it is sent and sends back what came.

Started by `test_distributed.py`; a process takes seconds to start, so one pair serves many tests.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import cloudpickle


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get between the answers
    while True:
        try:
            call = cloudpickle.load(requests)
        except EOFError:
            return
        answer: Any
        try:
            answer = ("returned", call())
        except Exception as error:
            answer = ("raised", type(error).__name__, str(error), traceback.format_exc())
        cloudpickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    sys.exit(main())
