"""What the sharpness probe found, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rightbatch.laws.estimate import Estimate
from rightbatch.recipe import Recipe

Directions = Literal["all", "random"]


@dataclass(frozen=True, kw_only=True)
class KeskarSharpness:
    """Keskar's φ at one ε, over all directions or in random subspaces.

    Attributes:
        epsilon: ε, the size of the box.
        directions: `all`: A = I; `random`: A is a random n × 100 matrix.
        dimension: Columns of A.
        phi: φ in percent. Over all directions the largest that was found: a lower bound, open
            above. In random subspaces the mean over subspaces, each a lower bound.
        starts: φ from each start (and, where A is random, for each A): how far they spread.
    """

    epsilon: float
    directions: Directions
    dimension: int
    phi: Estimate
    starts: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SharpnessPoint:
    """The sharpness of the loss at one set of weights.

    All numbers are about the mean loss of the same fixed training examples, in evaluation mode.

    Attributes:
        step: Updates done before; None for a model that was given.
        loss: Mean loss of the examples.
        gradient_norm: |∇f|: 0 at a minimum.
        largest_eigenvalue: λ_max of the Hessian, the algebraically largest.
        residual: |Hv − λv| of its eigenvector v, measured by one more product.
        iterations: Of Lanczos.
        converged: Whether the interval of λ_max is as tight as was asked for.
        trace: tr H.
        keskar: φ at each ε, over all directions and in random subspaces.
        sam_rise: f(w + ρ∇f/|∇f|) − f(w).
        sam_radius: ρ.
        num_examples: How many examples.
        num_weights: n.
        cost_examples: Examples processed: 1 for a gradient, ⅓ for a loss, 3 for a Hessian-vector
            product.
    """

    step: int | None
    loss: float
    gradient_norm: float
    largest_eigenvalue: Estimate
    residual: float
    iterations: int
    converged: bool
    trace: Estimate
    keskar: tuple[KeskarSharpness, ...]
    sam_rise: Estimate
    sam_radius: float
    num_examples: int
    num_weights: int
    cost_examples: int

    def phi(self, directions: Directions = "all", epsilon: float | None = None) -> Estimate:
        """One of the values of φ.

        Args:
            directions: `all` or `random`.
            epsilon: ε. Default: the first that was measured.

        Returns:
            The estimate.

        Raises:
            KeyError: If it was not measured.
        """
        for found in self.keskar:
            if found.directions == directions and epsilon in (None, found.epsilon):
                return found.phi
        raise KeyError(f"φ over {directions} directions at ε = {epsilon} was not measured.")


@dataclass(frozen=True, kw_only=True)
class SharpnessRecord:
    """What the sharpness probe found.

    Attributes:
        workload: Name of the workload.
        device: Where.
        seed: Of weights, data order, the examples, and everything drawn.
        weights: Whose: `given`, `initial` or `trained`.
        recipe: The training's, where there was one.
        points: One for each moment that was asked for.
        population: Training examples N, of which the points used some.
        notes: What a reader should know, in sentences.
        cost_examples: Examples processed, the training included.
        seconds: Wall time.
    """

    workload: str
    device: str
    seed: int
    weights: Literal["given", "initial", "trained"]
    recipe: Recipe | None
    points: tuple[SharpnessPoint, ...]
    population: int
    notes: tuple[str, ...]
    cost_examples: int
    seconds: float
