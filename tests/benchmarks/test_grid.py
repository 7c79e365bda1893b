"""The grid on a planted surface: linear regression with C = I and no noise, where all is known.

A step multiplies the expected loss by 1 − 2η + η²(1 + (d+1)/B), so the best rate is
1/(1 + (d+1)/B) and S = ln(L₀/L_T) / ln(1 + B/(d+1)).
"""

import math
from collections.abc import Sequence

import pytest
from benchmarks.regret.grid import Cell, Grid, Settings, batches_outward, explore
from benchmarks.regret.running import Arrival, State

DIMENSIONS, FALL, NUM_EXAMPLES = 15, math.log(200), 2048
ALPHA, BETA = 1e-3, 2e-5
SCOUT = tuple(range(-14, 5, 2))
SEED_SPREAD = 0.05
THRIFTY = Settings.thrifty(seeds=tuple(range(6)), first_batch=1)


def step_seconds(batch: float) -> float:
    return ALPHA + BETA * batch


def planted_steps(batch: int, log2_lr: int, seed: int = 0) -> float | None:
    rate = 2.0**log2_lr
    factor = 1 - 2 * rate + rate**2 * (1 + (DIMENSIONS + 1) / batch)
    if factor >= 1:
        return None
    return FALL / -math.log(factor) * (1 + SEED_SPREAD * (seed - 2.5) / 2.5)


class Planted:
    """Runs rows of the planted surface and remembers what was asked of it."""

    def __init__(self, settings: Settings, cells: Sequence[Cell] = ()) -> None:
        self.grid = Grid(step_seconds, settings, cells)
        self.rows: list[int] = []

    def run_row(self, batch: int, pairs: Sequence[tuple[int, int]]) -> None:
        self.rows.append(batch)
        limit = self.grid.make_limit(batch, pairs, most_steps=10**7)
        arrivals: list[Arrival | None] = [None] * len(pairs)
        when = [planted_steps(batch, *pair) for pair in pairs]
        # In the order in which they arrive, as a row that is run together does.
        for index in sorted(range(len(pairs)), key=lambda i: when[i] or math.inf):
            arrivals[index] = self._arrive(when[index], limit(arrivals))
        for (rate, seed), arrival in zip(pairs, arrivals, strict=True):
            assert arrival is not None
            self.grid.cells.append(
                Cell(global_batch=batch, log2_lr=rate, seed=seed, **vars(arrival))
            )

    @staticmethod
    def _arrive(when: float | None, limit: int) -> Arrival:
        if when is None:
            return Arrival(state="diverged", steps_to_target=None, steps_run=3)
        if when > limit:
            return Arrival(state="censored", steps_to_target=None, steps_run=limit)
        return Arrival(state="reached", steps_to_target=when, steps_run=math.ceil(when))

    def explore(self) -> list[str]:
        batches = batches_outward(NUM_EXAMPLES, self.grid.settings.first_batch)
        return explore(self.grid, batches, self.run_row, SCOUT)


def planted_best() -> tuple[int, int]:
    places = [(2**b, k) for b in range(12) for k in range(-16, 8)]
    cost = {
        (batch, k): steps * step_seconds(batch)
        for batch, k in places
        if (steps := planted_steps(batch, k)) is not None
    }
    return min(cost, key=lambda place: cost[place])


@pytest.mark.parametrize("settings", [Settings(), THRIFTY])
def test_finds_the_planted_best(settings: Settings) -> None:
    planted = Planted(settings)
    planted.explore()
    assert planted.grid.choose() == planted_best()


def test_the_best_rate_of_each_batch_is_the_formula_s_and_inside_the_window() -> None:
    planted = Planted(Settings())
    planted.explore()
    grid = planted.grid
    for batch in {cell.global_batch for cell in grid.cells}:
        place = grid.best(batch)
        if place is None:
            continue
        formula = -math.log2(1 + (DIMENSIONS + 1) / batch)
        assert abs(place[1] - formula) <= 1
        rates = {cell.log2_lr for cell in grid.at(batch)}
        assert len(rates) >= 8
        assert set(range(place[1] - 2, place[1] + 3)) <= rates


def test_only_hopeless_runs_are_cut() -> None:
    planted = Planted(Settings())
    planted.explore()
    best = planted.grid.best_seconds
    censored = [cell for cell in planted.grid.cells if cell.state == "censored"]
    assert censored
    for cell in censored:
        steps = planted_steps(cell.global_batch, cell.log2_lr, cell.seed)
        assert steps is not None
        assert steps * step_seconds(cell.global_batch) >= 8 * best * (1 - SEED_SPREAD)


def test_every_cell_of_a_full_grid_has_all_seeds_at_every_batch() -> None:
    planted = Planted(Settings())
    planted.explore()
    assert {cell.global_batch for cell in planted.grid.cells} == {2**b for b in range(12)}
    scouts = [c for c in planted.grid.at(32) if len(planted.grid.at(32, c.log2_lr)) == 1]
    for cell in planted.grid.cells:
        if cell not in scouts:
            seeds = {c.seed for c in planted.grid.at(cell.global_batch, cell.log2_lr)}
            assert seeds == set(range(6))


def test_the_window_is_widened_when_its_best_is_at_an_edge() -> None:
    best = planted_best()[1]
    planted = Planted(Settings())
    # All that is known says that the best rate is four octaves lower than it is.
    while pairs := planted.grid.missing(128, best - 4, (0, 1)):
        planted.run_row(128, pairs)
    place = planted.grid.best(128)
    assert place is not None
    assert abs(place[1] + math.log2(1 + (DIMENSIONS + 1) / 128)) <= 1
    assert max(cell.log2_lr for cell in planted.grid.cells) >= place[1] + 2


def test_goes_on_where_it_stopped_and_then_runs_nothing() -> None:
    whole = Planted(Settings())
    whole.explore()
    half = [cell for cell in whole.grid.cells if cell.global_batch in (16, 32, 64)]
    again = Planted(Settings(), half)
    again.explore()
    assert not {16, 32, 64} & set(again.rows)

    def known(grid: Grid) -> set[tuple[int, int, int]]:
        return {(cell.global_batch, cell.log2_lr, cell.seed) for cell in grid.cells}

    assert known(again.grid) == known(whole.grid)
    finished = Planted(Settings(), whole.grid.cells)
    finished.explore()
    assert finished.rows == []


def test_thrifty_runs_less_and_says_what_it_left_out() -> None:
    full, thrifty = Planted(Settings()), Planted(THRIFTY)
    full.explore()
    notes = thrifty.explore()
    assert len(thrifty.grid.cells) < len(full.grid.cells) / 3
    left_out = {2**b for b in range(12)} - {cell.global_batch for cell in thrifty.grid.cells}
    assert all(any(f"Batch {batch} " in note for note in notes) for batch in left_out)
    best = thrifty.grid.choose()
    assert best is not None
    assert {cell.seed for cell in thrifty.grid.at(*best)} == set(range(6))


def test_gives_up_where_nothing_arrives() -> None:
    grid = Grid(step_seconds, Settings())

    def run_row(batch: int, pairs: Sequence[tuple[int, int]]) -> None:
        grid.cells += [cell(batch, rate, seed, None) for rate, seed in pairs]

    notes = explore(grid, batches_outward(256, 1), run_row, SCOUT)
    assert "Nothing reached the target" in notes[0]
    assert grid.choose() is None


def cell(batch: int, rate: int, seed: int, steps: float | None, run: int = 50) -> Cell:
    state: State = "censored" if steps is None else "reached"
    return Cell(
        global_batch=batch,
        log2_lr=rate,
        seed=seed,
        state=state,
        steps_to_target=steps,
        steps_run=run if steps is None else math.ceil(steps),
    )


def test_a_cell_that_diverges_or_mostly_misses_is_never_best() -> None:
    lucky = [cell(32, 0, 0, 10.0), cell(32, 0, 1, 10.0)]
    bad = Cell(
        global_batch=32, log2_lr=0, seed=2, state="diverged", steps_to_target=None, steps_run=3
    )
    steady = [cell(32, -1, seed, 20.0) for seed in range(3)]
    missing = [cell(32, -2, 0, 5.0), cell(32, -2, 1, None), cell(32, -2, 2, None)]
    grid = Grid(step_seconds, Settings(seeds=(0, 1, 2)), [*lucky, bad, *steady, *missing])
    assert grid.choose() == (32, -1)


def test_one_lucky_seed_does_not_choose() -> None:
    lucky = [cell(64, 0, 0, 1.0)]
    steady = [cell(32, -1, seed, 20.0) for seed in range(6)]
    assert Grid(step_seconds, Settings(), [*lucky, *steady]).choose() == (32, -1)


@pytest.mark.parametrize(
    ("num_examples", "first", "expected"),
    [
        (1000, 1, [32, 64, 16, 128, 8, 256, 4, 512, 2, 1000, 1]),
        (20, 4, [16, 20, 8, 4]),
        (64, 8, [32, 64, 16, 8]),
    ],
)
def test_batches_from_32_outwards(num_examples: int, first: int, expected: list[int]) -> None:
    assert sorted(batches_outward(num_examples, first)) == sorted(expected)
    centre = math.log2(min(32, num_examples))
    found = [abs(math.log2(b) - centre) for b in batches_outward(num_examples, first)]
    assert found == sorted(found)
