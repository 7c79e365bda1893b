"""The batch that costs least, against brute force over every batch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.laws.efficiency import (
    Price,
    adascale_efficiency,
    adascale_gain,
    cost_optimal_batch,
    goodput,
)


def brute_force(
    critical: float | None,
    alpha: float,
    beta: float,
    largest: int,
    floor: float = 0.0,
    price: Price | None = None,
) -> float:
    price = price or Price(second=1)

    def cost(b: int) -> float:
        steps = 1 / b if critical is None else 1 + critical / b
        return steps * (
            price.second * max(floor, alpha + beta * b) + price.example * b + price.step
        )

    return min(cost(b) for b in range(1, largest + 1))


@given(
    critical=st.one_of(st.none(), st.floats(0.5, 5000)),
    alpha=st.floats(1e-5, 1e-1),
    beta=st.floats(1e-8, 1e-2),
    floor=st.sampled_from([0.0, 1e-3, 5e-2]),
    largest=st.integers(1, 800),
    price=st.sampled_from(
        [
            Price(second=1),
            Price(example=1),
            Price(step=1),
            Price(second=1, example=1e-5),
            Price(second=1, example=1e-4, step=1e-2),
        ]
    ),
)
def test_the_planted_best_batch_is_found(
    critical: float | None, alpha: float, beta: float, floor: float, largest: int, price: Price
) -> None:
    """science.md 6.5: α, β, φ, memory cap and price are given, the best batch is known."""
    found = cost_optimal_batch(
        critical_batch=critical,
        alpha_seconds=alpha,
        beta_seconds=beta,
        largest=largest,
        floor_seconds=floor,
        price=price,
    )
    assert 1 <= found <= largest
    steps = 1 / found if critical is None else 1 + critical / found
    cost = steps * (
        price.second * max(floor, alpha + beta * found) + price.example * found + price.step
    )
    assert cost <= brute_force(critical, alpha, beta, largest, floor, price) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("largest", "price", "expected"),
    [
        (10_000, Price(second=1), 200),  # √(400 · 1e-3/1e-5)
        (150, Price(second=1), 150),
        (10_000, Price(example=1), 1),
        (10_000, Price(step=1), 10_000),
    ],
)
def test_the_answer_depends_on_the_price(largest: int, price: Price, expected: int) -> None:
    found = cost_optimal_batch(
        critical_batch=400, alpha_seconds=1e-3, beta_seconds=1e-5, largest=largest, price=price
    )
    assert found == expected


def test_perfect_scaling_takes_the_largest_batch() -> None:
    found = cost_optimal_batch(
        critical_batch=None, alpha_seconds=1e-3, beta_seconds=1e-5, largest=777
    )
    assert found == 777


def test_the_time_optimal_batch_maximises_goodput() -> None:
    alpha, beta, critical = 2e-3, 1e-5, 300.0

    def useful(b: int) -> float:
        return goodput(
            b / (alpha + beta * b), global_batch=b, critical_batch=critical, initial_batch=1
        )

    best = max(range(1, 5000), key=useful)
    assert best == cost_optimal_batch(
        critical_batch=critical, alpha_seconds=alpha, beta_seconds=beta, largest=5000
    )
    assert best == pytest.approx(math.sqrt(critical * alpha / beta), abs=1)


def test_goodput_is_throughput_at_the_initial_batch() -> None:
    assert goodput(123.0, global_batch=32, critical_batch=500, initial_batch=32) == 123.0


@given(
    trace=st.floats(1e-6, 1e6),
    norm=st.floats(1e-6, 1e6),
    scale=st.floats(1, 1e4),
    more=st.floats(1, 10),
)
def test_adascale(trace: float, norm: float, scale: float, more: float) -> None:
    """Failure 11 of the peers: one stored commit multiplies where it should divide."""
    assert adascale_efficiency(1, trace=trace, gradient_norm_squared=norm) == pytest.approx(1)
    gain = adascale_gain(scale, trace=trace, gradient_norm_squared=norm)
    assert 1 - 1e-9 <= gain <= scale * (1 + 1e-9)
    efficiency = adascale_efficiency(scale, trace=trace, gradient_norm_squared=norm)
    assert 0 < efficiency <= 1 + 1e-9
    later = adascale_efficiency(scale * more, trace=trace, gradient_norm_squared=norm)
    assert later <= efficiency * (1 + 1e-9)


def test_adascale_limits() -> None:
    assert adascale_gain(8, trace=0.0, gradient_norm_squared=1.0) == 1
    assert adascale_gain(8, trace=1.0, gradient_norm_squared=0.0) == 8


def test_adascale_efficiency_is_the_hyperbola_with_the_noise_scale() -> None:
    """(φ + B₀)/(φ + B) with φ = S/|G|²: the same statement as goodput's."""
    trace, norm, initial = 300.0, 2.0, 16
    for scale in (1, 2, 10):
        expected = (trace / norm + initial) / (trace / norm + initial * scale)
        found = adascale_efficiency(scale, trace=trace / initial, gradient_norm_squared=norm)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("prices", [(0.0, 0.0, 0.0), (-1.0, 1.0, 0.0), (math.inf, 0.0, 0.0)])
def test_wrong_prices_are_refused(prices: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="none negative and one above 0"):
        Price(second=prices[0], example=prices[1], step=prices[2])


def test_wrong_times_are_refused() -> None:
    with pytest.raises(ValueError, match="times cannot be negative"):
        cost_optimal_batch(critical_batch=1, alpha_seconds=-1, beta_seconds=1, largest=5)
    with pytest.raises(ValueError, match="largest must be at least 1"):
        cost_optimal_batch(critical_batch=1, alpha_seconds=1, beta_seconds=1, largest=0)
