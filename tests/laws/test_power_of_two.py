import numpy as np
import pytest

from rightbatch.errors import UsageError
from rightbatch.laws.power_of_two import compare_power_of_two
from rightbatch.laws.rounds import estimate_median


def rounds_of(
    rng: np.random.Generator, gain: float, noise: float, num: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t = 1 + 0.01 B with 64 cheaper by `gain`, under a machine that slows down by half."""
    drift = np.linspace(1, 1.5, num)
    jitter = np.exp(noise * rng.standard_normal((3, num)))
    lawful = np.array([1.63, 1.64 * (1 - gain), 1.65])
    below, at, above = lawful[:, None] * drift * jitter
    return below, at, above


def test_a_faster_power_of_two_is_found() -> None:
    answer = compare_power_of_two(64, *rounds_of(np.random.default_rng(0), 0.1, 0.01))
    assert answer.verdict == "yes"
    assert answer.ratio.value == pytest.approx(0.9, abs=0.01)
    assert answer.sentence.startswith("64 is faster than its neighbours: it takes ")


def test_the_slope_of_the_law_is_no_effect() -> None:
    answer = compare_power_of_two(64, *rounds_of(np.random.default_rng(1), 0.0, 0.005))
    assert answer.verdict == "no"
    assert answer.ratio.value == pytest.approx(1, abs=0.005)
    assert "is not faster" in answer.sentence


def test_noise_gives_no_verdict() -> None:
    answer = compare_power_of_two(64, *rounds_of(np.random.default_rng(2), 0.02, 0.2))
    assert answer.verdict == "too noisy"
    assert "Too noisy to tell whether 64" in answer.sentence


def test_wrong_verdicts_are_rare() -> None:
    rng = np.random.default_rng(3)
    for gain, wrong in ((0.0, "yes"), (0.05, "no")):
        verdicts = [
            compare_power_of_two(64, *rounds_of(rng, gain, 0.03)).verdict for _ in range(200)
        ]
        assert verdicts.count(wrong) <= 6


@pytest.mark.parametrize("n", [3, 5, 8, 15])
def test_the_medians_interval_covers_it(n: int) -> None:
    rng = np.random.default_rng(n)
    estimates = [estimate_median(np.exp(0.1 * rng.standard_normal(n))) for _ in range(400)]
    hits = [e.low is not None and e.high is not None and e.low <= 1 <= e.high for e in estimates]
    assert np.mean(hits) >= 0.91


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="2 rounds were timed; at least 3 are needed"):
        compare_power_of_two(64, [1, 1], [1, 1], [1, 1])
    with pytest.raises(UsageError, match="0 timings, of which 0 are not positive and finite"):
        estimate_median([])
