"""The part of a study's text that is about minima and gradients."""

from __future__ import annotations

from rightbatch import load_workload, run_study
from rightbatch.cli.render_minima import gradient_sentences, minima_sentences, minima_table
from rightbatch.cli.render_study import study_text


def test_a_study_says_what_minima_and_gradients_are_like() -> None:
    study = run_study(
        load_workload("max3"), batch_sizes=[50, "full"], learning_rates=[0.5], seeds=3, epochs=4,
        engine="loop", watch="0.weight[2,1]",
    )  # fmt: skip
    table = minima_table(study)
    assert "distance" in table and "noise floor" in table and "not resolved" in table
    (rough, far) = minima_sentences(study)[:2]
    assert "Over 4 epochs at their best learning rates, the path of 0.weight[2,1] is" in rough
    assert "both at 0.5" in rough and "times as rough at batch 50 as at 1,000" in rough
    assert "as far from its initial weights" in far
    first, then = gradient_sentences(study)[:2]
    assert first.startswith("At the initial weights, the gradient's error falls with slope -0.")
    assert then.startswith("After ") and "Cosine to the full gradient" in then
    assert max(len(line) for line in study_text(study).splitlines()) <= 80


def test_one_seed_and_a_dead_weight_are_said() -> None:
    study = run_study(
        load_workload("max3"), batch_sizes=[50, "full"], learning_rates=[0.5], seeds=1, epochs=2,
        engine="loop",
    )  # fmt: skip
    assert "dead" in minima_table(study)
    said = " ".join(minima_sentences(study))
    assert "0.weight[0,0] never moved at 1 of 1 seeds: it is dead there" in said
