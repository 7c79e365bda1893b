"""The search returns only what it ran, is proven or says so, and needs few runs."""

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.laws.search import CeilingSearch, Trial, bracket, find_ceiling

MIB = 1 << 20


def truth(fits, max_size: int) -> int:
    """By trying every size: the naive reference."""
    return next((n - 1 for n in range(1, max_size + 1) if not fits(n)), max_size)


def run_without_peaks(fits, **options):
    search = CeilingSearch(**options)
    trials = find_ceiling(search, lambda n: Trial(size=n, fits=fits(n)))
    return search, trials, bracket(trials, search.max_size)[0]


def run_with_peaks(peak, limit, *, fixed=None, **options):
    def run(n):
        fits = peak(n) <= limit
        return Trial(
            size=n, fits=fits, peak_bytes=round(peak(n)) if fits else None, fixed_bytes=fixed
        )

    search = CeilingSearch(limit_bytes=limit, **options)
    trials = find_ceiling(search, run)
    return search, trials, bracket(trials, search.max_size)[0]


def check_sanity(trials, answer, max_size):
    sizes = [t.size for t in trials]
    assert len(set(sizes)) == len(sizes), "a size was run twice"
    assert all(1 <= n <= max_size for n in sizes)
    assert answer == 0 or Trial(size=answer, fits=True) in [
        Trial(size=t.size, fits=t.fits) for t in trials
    ], "the answer did not run"


@given(
    max_size=st.integers(1, 3000),
    limit=st.integers(0, 3000),
    start=st.none() | st.integers(1, 4000),
    exact=st.booleans(),
)
@example(max_size=100, limit=90, start=None, exact=True)
@example(max_size=100, limit=5, start=64, exact=True)
@example(max_size=48, limit=100, start=2, exact=False)
def test_without_peaks(max_size, limit, start, exact):
    def fits(n):
        return n <= limit

    search, trials, answer = run_without_peaks(
        fits, max_size=max_size, start=start, exact=exact, max_trials=None
    )
    expected = truth(fits, max_size)
    check_sanity(trials, answer, max_size)
    assert answer <= expected
    if exact:
        assert answer == expected
    assert answer >= 0.9 * expected
    assert search.proven(trials)
    # Doubling, bisecting, and once down from a start that was too large.
    assert len(trials) <= 2 * math.log2(max_size + 2) + 8


@settings(max_examples=300)
@given(
    fixed=st.integers(1 * MIB, 2000 * MIB),
    slope=st.floats(500, 3e7),
    room=st.integers(20 * MIB, 30_000 * MIB),
    max_size=st.integers(1, 300_000),
    noise=st.integers(0, 2**32 - 1),
)
def test_a_line_takes_six_runs_at_most(fixed, slope, room, max_size, noise):
    def peak(n):
        wiggle = ((n * 2654435761 + noise) % 2**32) / 2**32  # in [0, 1), no pattern in n
        return fixed + slope * n + wiggle * 0.5 * MIB

    limit = fixed + room
    assume(peak(1) <= limit)
    search, trials, answer = run_with_peaks(peak, limit, fixed=fixed, max_size=max_size)
    expected = min(max_size, math.floor(room / slope))
    check_sanity(trials, answer, max_size)
    assert len(trials) <= 6
    assert answer >= 0.9 * expected - 1
    assert search.proven(trials) or answer >= 0.9 * expected - 1


@settings(max_examples=300)
@given(
    fixed=st.integers(1 * MIB, 1000 * MIB),
    slope=st.floats(1e4, 1e7),
    room=st.integers(100 * MIB, 10_000 * MIB),
    kink=st.integers(1, 100_000),
    factor=st.floats(0.25, 4),
    jump=st.floats(0, 0.5),
    max_size=st.integers(1, 100_000),
)
def test_a_kinked_law_never_gives_an_untested_size(
    fixed, slope, room, kink, factor, jump, max_size
):
    def peak(n):
        bend = (factor - 1) * slope * (n - kink) + jump * room if n > kink else 0.0
        return fixed + slope * n + max(bend, -0.75 * slope * n)

    limit = fixed + room
    assume(peak(1) <= limit)
    search, trials, answer = run_with_peaks(peak, limit, fixed=fixed, max_size=max_size)
    lo, hi = 0, max_size + 1
    while hi - lo > 1:
        middle = (lo + hi) // 2
        lo, hi = (middle, hi) if peak(middle) <= limit else (lo, middle)
    check_sanity(trials, answer, max_size)
    assert 1 <= answer <= lo
    assert len(trials) <= 6
    if search.proven(trials):
        assert answer >= 0.9 * lo
    # What six runs cannot decide, more can.
    search, trials, answer = run_with_peaks(
        peak, limit, fixed=fixed, max_size=max_size, max_trials=None
    )
    assert search.proven(trials)
    assert answer >= 0.9 * lo
    _, trials, answer = run_with_peaks(peak, limit, fixed=fixed, max_size=max_size, exact=True)
    assert answer == lo
    assert len(trials) <= 30


def test_kinked_laws_are_decided_in_six_runs_nearly_always():
    decided, total = 0, 0
    for slope in (2e4, 3e5, 4e6):
        for kink in (3, 30, 300, 3000):
            for factor in (0.25, 0.5, 2, 4):

                def peak(n, slope=slope, kink=kink, factor=factor):
                    return 3e8 + slope * n + (factor - 1) * slope * max(0, n - kink)

                answer = run_with_peaks(peak, 4 << 30, fixed=round(3e8), max_size=50_000)[2]
                exact = run_with_peaks(peak, 4 << 30, max_size=50_000, exact=True)[2]
                total += 1
                decided += answer >= 0.9 * exact
    assert decided >= 0.95 * total, f"{decided} of {total}"


def test_the_usual_case_step_by_step():
    # 100 bytes are fixed and each example takes 10; 1000 are free: 90 fit.
    big = MIB * 1000
    search = CeilingSearch(max_size=5000, limit_bytes=1000 * big)
    trials = []
    for size, fits in [(8, True), (87, True)]:
        assert search.next_size(trials) == size
        trials.append(
            Trial(size=size, fits=fits, peak_bytes=(100 + 10 * size) * big, fixed_bytes=100 * big)
        )
    # (87 and not 90: the answer is to keep some headroom.)
    # Now a size whose failure proves 87: above 87 / 0.9.
    assert search.next_size(trials) == 97
    trials.append(Trial(size=97, fits=False))
    assert search.next_size(trials) is None
    assert search.proven(trials)


def test_the_largest_size_that_makes_sense_ends_the_search():
    _, trials, answer = run_with_peaks(lambda n: 100.0 * MIB + n, 200 * MIB, max_size=1437)
    assert answer == 1437
    assert len(trials) <= 8


def test_peaks_that_shrink_do_not_stop_it():
    _, _, answer = run_with_peaks(
        lambda n: 100.0 * MIB - n, 200 * MIB, fixed=90 * MIB, max_size=1000
    )
    assert answer == 1000


def test_not_even_one():
    _, trials, answer = run_without_peaks(lambda n: False, max_size=500, start=64)
    assert answer == 0
    assert trials[-1].size == 1
    assert len(trials) <= 5


def test_six_runs_unless_told_otherwise_but_never_without_an_answer():
    search, trials, answer = run_without_peaks(lambda n: n <= 3001, max_size=10_000)
    assert len(trials) == 6
    assert answer == 256
    assert not search.proven(trials)
    _, trials, answer = run_without_peaks(lambda n: n <= 1, max_size=2**40, start=2**40)
    assert answer == 1


def test_a_fit_above_a_failure_does_not_count():
    trials = [Trial(size=n, fits=f) for n, f in [(8, True), (16, False), (32, True)]]
    assert bracket(trials, 100) == (8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_size": 0}, "max_size is 0; it must be at least 1"),
        ({"max_size": 5, "start": 0}, "start is 0; it must be at least 1"),
        ({"max_size": 5, "tolerance": 0.0}, r"tolerance is 0\.0; it must be above 0"),
        ({"max_size": 5, "tolerance": 1.5}, r"tolerance is 1\.5"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        CeilingSearch(**options)
