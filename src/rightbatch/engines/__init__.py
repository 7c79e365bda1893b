"""Ways to run many small trainings: compiled (lowered to JAX), vmapped (stacked), and a loop."""

from rightbatch.engines.copies import Copies, CopiesEvaluation
from rightbatch.engines.make import Engine, make_copies

__all__ = ["Copies", "CopiesEvaluation", "Engine", "make_copies"]
