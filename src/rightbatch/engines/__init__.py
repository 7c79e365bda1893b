"""Ways to run many small trainings fast: compiled (the torch step lowered to JAX), and a loop."""

from rightbatch.engines.copies import Copies, CopiesEvaluation
from rightbatch.engines.make import make_copies

__all__ = ["Copies", "CopiesEvaluation", "make_copies"]
