"""The pure parts of the overhead benchmark: ratios, blocks, the table; and that our rows run."""

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.overhead.frameworks import make_keras, split_epochs
from benchmarks.overhead.measure import (
    Block,
    Cell,
    check_rows,
    choose_block,
    choose_short_fit,
    measure_cell,
)
from benchmarks.overhead.ratios import bar_of, estimate_median_ratio, judge, median_rank
from benchmarks.overhead.rows import SkippedRowError
from benchmarks.overhead.table import make_lines, render_markdown, render_terminal, write_results

from rightbatch import catalog
from rightbatch.errors import UsageError
from rightbatch.laws.estimate import Estimate

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "threads": 1,
    "system": "Linux x86_64",
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-01",
}


def blocks(*seconds: float) -> list[Block]:
    return [Block(thread_seconds=s, process_seconds=s, wall_seconds=2 * s) for s in seconds]


def ratio(value: float, low: float | None, high: float | None) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=9, method="")


@pytest.mark.parametrize("n", range(1, 60))
def test_the_rank_is_the_largest_that_covers_95_percent(n: int) -> None:
    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(n, j) for j in range(rank)) / 2**n

    rank = median_rank(n)
    assert rank == 0 or coverage(rank) >= 0.95
    assert coverage(rank + 1) < 0.95


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw, held = random.Random(1), 0
    for _ in range(2000):
        found = estimate_median_ratio([draw.expovariate(1.0) for _ in range(15)], [1.0] * 15)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= math.log(2) <= found.high
    assert 0.95 - 0.015 < held / 2000 < 0.99


def test_a_drift_that_pairs_share_leaves_the_ratio_alone() -> None:
    drift = [1.0, 1.5, 3.0, 2.0, 0.5, 0.7, 1.1]
    found = estimate_median_ratio([1.2 * d for d in drift], drift)
    assert (found.value, found.low, found.high) == pytest.approx((1.2, 1.2, 1.2))


def test_few_rounds_give_no_interval() -> None:
    found = estimate_median_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (found.value, found.low, found.high) == (2.0, None, None)


def test_a_bar_is_met_or_missed_only_when_the_whole_interval_is_on_one_side() -> None:
    assert judge(ratio(1.0, 0.9, 1.05), 1.05) == "met"
    assert judge(ratio(1.2, 1.06, 1.3), 1.05) == "missed"
    assert judge(ratio(1.0, 0.9, 1.06), 1.05) == "open"
    assert judge(ratio(1.0, None, None), 1.05) == "open"
    assert judge(ratio(1.0, 0.9, 1.1), None) == ""


def test_bars() -> None:
    assert [bar_of("ours", size) for size in (1, 8, 32, 256)] == [1.25, None, 1.05, 1.05]
    assert [bar_of("watching ÷ ours", size) for size in (1, 32)] == [None, 1.05]
    assert bar_of("watching", 32) is None


@pytest.mark.parametrize("per_epoch", [1, 6, 45, 128, 1438])
@pytest.mark.parametrize("step_seconds", [1e-4, 1e-3, 0.07])
def test_fits_are_whole_epochs_or_lie_within_one(step_seconds: float, per_epoch: int) -> None:
    block = choose_block(step_seconds, per_epoch)
    short = choose_short_fit(block, per_epoch)
    assert block >= 1
    assert short >= 1
    for steps in (short, short + block):
        assert steps <= per_epoch or steps % per_epoch == 0


def test_epochs_do_the_steps_that_were_asked_for() -> None:
    for steps in (1, 7, 44, 45, 90, 450):
        epochs, num_examples = split_epochs(steps, 32, 1438)
        assert epochs * math.ceil(num_examples / 32) == steps


def make_cell() -> Cell:
    return Cell(
        workload="digits",
        asked_batch=32,
        global_batch=32,
        block_steps=45,
        blocks={
            "hand-written": blocks(*[1e-4] * 8),
            "ours": blocks(*[1.2e-4] * 8),
            "watching": blocks(*[1.23e-4] * 8),
        },
        skipped={"keras": "keras is not installed"},
    )


def test_lines_compare_with_the_right_row() -> None:
    found = {line.row: line for line in make_lines([make_cell()])}
    assert found["hand-written"].ratio is None
    assert found["ours"].microseconds == pytest.approx(120)
    for row, value in (("ours", 1.2), ("ours, watching", 1.23), ("watching ÷ ours", 1.025)):
        estimate = found[row].ratio
        assert estimate is not None
        assert estimate.value == pytest.approx(value)
    assert found["ours"].verdict == "missed"
    assert found["ours, watching"].verdict == ""
    assert found["watching ÷ ours"].verdict == "met"
    assert found["Keras on torch"].skipped == "keras is not installed"


def test_the_table_is_aligned_and_says_why_a_row_is_missing() -> None:
    head, *rows = render_terminal(make_lines([make_cell()])).splitlines()
    ours = next(row for row in rows if "  ours  " in row)
    assert ours.split()[-1] == "missed"
    assert ours.index("1.200") + len("1.200") == head.index("ratio") + len("ratio")
    assert any(row.endswith("skipped: keras is not installed") for row in rows)


def test_a_batch_beyond_the_data_is_said() -> None:
    cell = make_cell()
    smaller = Cell(**{**vars(cell), "asked_batch": 256})
    assert make_lines([smaller])[0].batch == "32 (all; 256 asked)"


def test_the_page_and_the_record(tmp_path: Path) -> None:
    cell = make_cell()
    page = write_results([cell], MACHINE, tmp_path)
    assert page.read_text() == render_markdown(make_lines([cell]), [cell], MACHINE)
    assert "| digits | 32 | ours | 120 | 1.200 | 1.200–1.200 | 1.200 | ≤ 1.05 | missed |" in (
        page.read_text()
    )
    assert "- digits, Keras on torch: keras is not installed." in page.read_text()
    record = json.loads((tmp_path / "overhead.json").read_text())
    assert record["cells"][0]["blocks"]["ours"]["wall_seconds"] == [2.4e-4] * 8
    assert len(record["lines"]) == 5


def test_our_rows_are_timed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.overhead.measure.BLOCK_SECONDS", 0.005)
    cell = measure_cell(catalog.get("digits"), 4096, rows=("ours",), num_rounds=2)
    assert cell.global_batch == 1438
    assert {name: len(found) for name, found in cell.blocks.items()} == {
        "hand-written": 2,
        "again": 2,
        "ours": 2,
    }
    assert statistics.median(block.thread_seconds for block in cell.blocks["ours"]) > 0


def test_keras_says_why_it_cannot_train_the_transformer() -> None:
    with pytest.raises(SkippedRowError, match="rebuilt from Keras's layers"):
        make_keras(catalog.get("source-lm"), 32)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"There is no row 'fastai' here\. There are: ours, watch"):
        check_rows(["fastai"], ["digits"])
    with pytest.raises(UsageError, match="There is no workload 'max3' here"):
        check_rows(["ours"], ["max3"])


def test_the_command_refuses_in_a_sentence() -> None:
    command = [sys.executable, "benchmarks/overhead.py", "--rows", "fastai"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("There is no row 'fastai'")
    assert "Traceback" not in done.stderr
