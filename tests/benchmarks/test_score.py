"""Scores: regret with its interval, runs on fresh seeds, and what is kept between calls."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.regret import score, table, truth
from benchmarks.regret.grid import Settings
from benchmarks.regret.peers import Choice, OptunaSearch, Situation, choose_by_lightning
from benchmarks.regret.running import Arrival
from benchmarks.regret.score import NEVER, Regret, Scored, Scores, estimate_regret
from benchmarks.regret.truth import Truth
from tests.benchmarks.test_grid import Planted, cell

from rightbatch import catalog
from rightbatch.errors import UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.timing import StepTime, StepTimeLaw
from rightbatch.recipe import Recipe

RECIPE = Recipe(global_batch=64, learning_rate=0.25)


def make_step_time(alpha: float, beta: float) -> StepTime:
    law = StepTimeLaw(
        alpha_seconds=Estimate(value=alpha, n=1),
        beta_seconds=Estimate(value=beta, n=1),
        floor_seconds=Estimate(value=None, n=1),
        knee=Estimate(value=alpha / beta, n=1),
        misfit=0.0,
    )
    return StepTime(law=law, micro_batches=(1, 1024), ratios=(1.0, 1.0))


def make_truth() -> Truth:
    """The quadratic's, with a grid of two places: enough to score."""
    workload = catalog.get("quadratic")
    assert workload.target is not None
    cells = [cell(64, -2, seed, 60.0 + seed) for seed in range(6)]
    cells += [cell(32, -3, seed, 200.0 + seed) for seed in range(6)]
    return Truth(
        workload="quadratic",
        num_examples=workload.num_examples,
        target=workload.target,
        fingerprint=truth.take_fingerprint(workload),
        machine=truth.describe_machine(),
        clock="planted",
        step_time=make_step_time(1e-3, 1e-6),
        settings=Settings(),
        notes=("Planted.",),
        wall_seconds=0.0,
        cells=tuple(cells),
    )


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (truth, score, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


# ---- regret --------------------------------------------------------------------------------------


def test_regret_of_the_best_is_zero_and_of_a_multiple_that_multiple() -> None:
    best = [1.0, 2.0, 4.0]
    assert estimate_regret(best, best, 18.0) == Regret(
        mean=0.0, median=0.0, low=0.0, high=0.0, reached=1.0
    )
    tripled = estimate_regret([3.0, 6.0, 12.0], best, 100.0)
    assert (tripled.mean, tripled.low, tripled.high) == pytest.approx((2.0, 2.0, 2.0))


def test_a_run_that_does_not_arrive_counts_as_the_cap() -> None:
    regret = estimate_regret([None, None], [1.0, 1.0], cap=8.0)
    assert (regret.mean, regret.reached) == (NEVER, 0.0)
    assert estimate_regret([1.0, None], [1.0, 1.0], cap=8.0).mean == pytest.approx(3.5)


def test_the_interval_covers_the_true_regret() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        best, ours = np.exp(0.15 * rng.standard_normal((2, 12)))
        regret = estimate_regret((1.3 * ours).tolist(), best.tolist(), 100.0)
        covered += regret.low <= 0.3 <= regret.high
    # The bootstrap of twelve is known to be a little short.
    assert 0.86 <= covered / 200 <= 0.98


def test_chosen_on_luck_is_no_winner_on_fresh_seeds() -> None:
    """Of many equal places the luckiest is chosen; on fresh seeds its regret is 0 on average."""
    rng = np.random.default_rng(1)
    fresh: list[float] = []
    for _ in range(200):
        grid = np.exp(0.3 * rng.standard_normal((50, 6)))
        assert grid[grid.mean(axis=1).argmin()].mean() < 0.95  # the winner's curse, if believed
        again, choice = np.exp(0.3 * rng.standard_normal((2, 6)))
        fresh.append(estimate_regret(choice.tolist(), again.tolist(), 100.0).mean)
    assert abs(float(np.mean(fresh))) < 0.05


# ---- running choices -----------------------------------------------------------------------------


def test_scores_are_run_on_fresh_seeds_and_kept(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.save_truth(make_truth())
    asked: list[tuple[str, int, float | None]] = []

    def choose(row: str, recipe: Recipe | None, examples: float) -> object:
        def method(situation: Situation, seed: int) -> Choice:
            asked.append((row, seed, situation.race_examples))
            return Choice(row=row, seed=seed, recipe=recipe, examples=examples)

        return method

    best = Recipe(global_batch=64, learning_rate=0.25)
    methods = {
        "race": choose("race", best, 1234.0),
        "Optuna": choose("Optuna", best.replace(global_batch=1), 0.0),
        "Lightning": choose("Lightning", None, 10.0),
    }
    monkeypatch.setattr(score, "ROWS", methods)

    def run(seeds: range, again: bool = False) -> Scores:
        return score.score_workload(
            catalog.get("quadratic"),
            rows=None,
            method_seeds=seeds,
            num_fresh=3,
            again=again,
            say=lambda _: None,
        )

    scores = run(range(1))
    assert scores.fresh_seeds == (100, 101, 102)
    assert (scores.best_batch, scores.best_rate) == (64, 0.25)
    by_row = {scored.choice.row: scored for scored in scores.scored}
    # The same training as the grid's best, so the same seconds: seed for seed.
    assert by_row["race"].seconds == pytest.approx(scores.best_seconds)
    assert None not in scores.best_seconds
    # Batch 1 at this rate diverges.
    assert by_row["Optuna"].seconds == (None, None, None)
    assert score.regret_of(by_row["Lightning"], scores) is None
    # Optuna is told what the race cost.
    assert asked == [("race", 0, None), ("Optuna", 0, 1234.0), ("Lightning", 0, 1234.0)]

    assert run(range(1)) == scores
    assert len(asked) == 3
    assert len(run(range(2)).scored) == 6
    assert len(run(range(1), again=True).scored) == 3

    # What was run to another target is run again.
    path = score.scores_path("quadratic")
    path.write_text(path.read_text().replace(scores.target, "val_loss<=9"))
    assert run(range(1)).target == scores.target


def test_refuses_what_cannot_be_scored(results: Path) -> None:
    def run(rows: list[str]) -> None:
        score.score_workload(
            catalog.get("quadratic"),
            rows=rows,
            method_seeds=[0],
            num_fresh=1,
            again=False,
            say=lambda _: None,
        )

    with pytest.raises(UsageError, match="no row 'magic'"):
        run(["magic"])
    with pytest.raises(UsageError, match="was not measured"):
        run(["probe"])
    truth.save_truth(replace(make_truth(), fingerprint=(1.0, 2.0, 3.0, 4.0)))
    with pytest.raises(UsageError, match="measured on another"):
        run(["probe"])


# ---- files ---------------------------------------------------------------------------------------


def test_truth_goes_to_disk_and_back(results: Path) -> None:
    saved = make_truth()
    truth.save_truth(saved)
    assert truth.load_truth("quadratic") == saved
    lines = (results / "quadratic.json").read_text().splitlines()
    assert sum('"log2_lr"' in line for line in lines) == len(saved.cells)
    assert json.loads("\n".join(lines))["schema"] == truth.SCHEMA


def test_a_file_of_another_schema_is_refused(results: Path) -> None:
    (results / "quadratic.json").write_text('{"schema": "rightbatch.other/1"}')
    (results / "quadratic.scores.json").write_text('{"schema": "rightbatch.other/1"}')
    with pytest.raises(UsageError, match="not of schema"):
        truth.load_truth("quadratic")
    with pytest.raises(UsageError, match="not of schema"):
        score.load_scores("quadratic")


def test_costs_are_counted_in_examples() -> None:
    planted = make_truth()
    expected = sum((60 + seed) * 64 + (200 + seed) * 32 for seed in range(6))
    assert planted.cost_examples == pytest.approx(expected)
    baseline = planted.baseline()
    assert baseline is not None
    assert baseline[0] == -3
    assert baseline[1] == pytest.approx(202.5 * 32, rel=1e-3)


# ---- Optuna's objective --------------------------------------------------------------------------


def test_optuna_s_trials_stop_at_twice_the_best_and_at_the_budget() -> None:
    limits: list[int] = []
    arrives_at = iter([None, 40.0, None, 30.0])

    def run(workload: object, batch: int, rates: object, seeds: object, limit: object) -> object:
        limits.append(limit([]))  # type: ignore[operator]
        steps = next(arrives_at)
        if steps is None:
            return [Arrival(state="censored", steps_to_target=None, steps_run=limits[-1])]
        return [Arrival(state="reached", steps_to_target=steps, steps_run=int(steps))]

    situation = Situation(workload=catalog.get("quadratic"), truth=make_truth())
    search = OptunaSearch(situation, 20_000, run)  # type: ignore[arg-type]
    values = [search.run(64, 0.1 * k, 0) for k in range(1, 5)]
    # A quarter of the budget, until one has arrived; then twice the best.
    assert limits[0] == 79
    assert limits[1] == 79
    assert limits[2] == 80
    assert search.best == Recipe(global_batch=64, learning_rate=0.4)
    assert values[3] < values[1] < min(values[0], values[2])
    assert search.spent == pytest.approx((79 + 40 + 80 + 30) * 64)
    assert limits[3] == min(80, -(-(20_000 - (79 + 40 + 80) * 64) // 64))


# ---- the table -----------------------------------------------------------------------------------


def make_scores() -> Scores:
    choices = [
        Choice(row="race", seed=0, recipe=RECIPE, near_low=32, near_high=128, examples=6480.0),
        Choice(row="race", seed=1, recipe=RECIPE, near_low=128, near_high=512, examples=12960.0),
        Choice(row="Lightning", seed=0, recipe=None, examples=648.0),
        Choice(row="scikit-learn", seed=0, recipe=RECIPE),
    ]
    seconds = [(0.1, 0.1), (0.15, 0.15), (None, None), (None, 0.1)]
    return Scores(
        target="val_loss<=1",
        workload="quadratic",
        fresh_seeds=(100, 101),
        best_batch=64,
        best_rate=0.25,
        best_seconds=(0.1, 0.1),
        cap_seconds=0.8,
        scored=tuple(Scored(choice=c, seconds=s) for c, s in zip(choices, seconds, strict=True)),
    )


def test_results_count_regret_cost_and_coverage() -> None:
    found = table.collect(make_truth(), make_scores())
    first, second, nothing, half = found
    assert [result.regret for result in found] == pytest.approx([0.0, 0.5, NEVER, 3.5])
    assert (first.covers, second.covers, nothing.covers) == (True, False, None)
    assert (first.span, second.span) == (4.0, 4.0)
    assert first.full_trainings == pytest.approx(1.0, rel=1e-2)
    assert first.share_of_grid == pytest.approx(6480 / make_truth().cost_examples)
    assert (nothing.reached, half.reached) == (0.0, 0.5)


def test_the_summary_has_a_line_per_method() -> None:
    text = table.summary(table.collect(make_truth(), make_scores()))
    rows = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines()[2:]}
    assert set(rows) == {"race", "Lightning", "scikit-learn"}
    cells = [c.strip() for c in rows["race"]]
    assert cells[2:6] == ["2", "25 %", "50 %", "0"]
    assert cells[9:12] == ["1 of 2", "4.0×", "4.0×"]
    assert [c.strip() for c in rows["Lightning"]][3:6] == ["≥ 700 %", "≥ 700 %", "1"]


def test_the_table_is_written_from_what_is_on_disk(results: Path) -> None:
    truth.save_truth(make_truth())
    said: list[str] = []
    text = table.write_table(results / "regret.md", said.append).read_text()
    assert "quadratic has a grid and no scores" in said[0]
    assert "### quadratic" not in text
    score.save_scores(make_scores())
    text = table.write_table(results / "regret.md").read_text()
    assert "### quadratic" in text
    assert "batch 64, learning rate 0.25" in text
    assert "Planted." in text
    relative = 202.5 * (1e-3 + 32e-6) / (62.5 * (1e-3 + 64e-6))
    assert f"| seconds ÷ best | {relative:.2f} | 1.00 |" in text


def test_the_shape_says_where_nothing_arrived() -> None:
    planted = Planted(Settings())
    planted.explore()
    cells = tuple(c for c in planted.grid.cells if c.global_batch != 32)
    lost = tuple(cell(32, 0, seed, None) for seed in range(6))
    text = table.shape(replace(make_truth(), cells=(*cells, *lost)))
    assert "> 8" in text


# ---- Lightning's tuners --------------------------------------------------------------------------


def test_lightning_s_tuners_choose_what_can_be_run_and_their_cost_is_counted() -> None:
    pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        situation = Situation(workload=catalog.get("quadratic"), truth=make_truth())
        before = torch.random.get_rng_state()
        typical = choose_by_lightning(situation, 0, 32)
        largest = choose_by_lightning(situation, 0, None)
    assert torch.equal(before, torch.random.get_rng_state())
    assert typical.recipe is not None
    assert largest.recipe is not None
    assert (typical.row, typical.recipe.global_batch) == ("batch 32, lr_find", 32)
    assert typical.examples == 100 * 32
    # Three steps at each of 2, 4 … 512, then the range test with all examples in a batch.
    assert largest.recipe.global_batch == 1024
    assert largest.examples == pytest.approx(100 * 1024 + 3 * 1022, abs=3 * 1024)
