"""Numbers, durations, amounts of memory and intervals as people read them."""

from __future__ import annotations

from rightbatch.laws.estimate import Estimate


def show_number(value: float | None) -> str:
    """A number with three significant digits; whole numbers below a million in full.

    Args:
        value: The number, or None.

    Returns:
        Such as `0.123`, `1,234`, `1.2e-05`, or `?` for None.

    Example:
        >>> [show_number(x) for x in (0.12345, 1234, 12345.6, 1.2e-5, 3.0, None)]
        ['0.123', '1,234', '12,346', '1.2e-05', '3', '?']
    """
    if value is None:
        return "?"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 100 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show_seconds(seconds: float | None) -> str:
    """A duration with its unit.

    Args:
        seconds: The duration, or None.

    Returns:
        Such as `1.25 ms`, `3.2 s`, `2 min 5 s`.

    Example:
        >>> [show_seconds(x) for x in (4.2e-6, 0.00125, 3.21, 125, 7300, None)]
        ['4.2 µs', '1.25 ms', '3.21 s', '2 min 5 s', '2 h 1 min', '?']
    """
    if seconds is None:
        return "?"
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    if abs(seconds) < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def show_bytes(num_bytes: float | None) -> str:
    """An amount of memory with its unit.

    Args:
        num_bytes: Bytes, or None.

    Returns:
        Such as `512 B`, `1.5 KiB`, `7.8 GiB`.

    Example:
        >>> [show_bytes(x) for x in (512, 1536, 8.4e9, None)]
        ['512 B', '1.5 KiB', '7.82 GiB', '?']
    """
    if num_bytes is None:
        return "?"
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def show_interval(estimate: Estimate) -> str:
    """The interval of an estimate, in words where a side is open.

    Args:
        estimate: The estimate.

    Returns:
        Such as `10.2–13.9`, `at least 4`, `unresolved`.

    Example:
        >>> show_interval(Estimate(value=12.0, low=10.2, high=13.94, n=5))
        '10.2–13.9'
        >>> show_interval(Estimate(value=None, low=4.0, n=5))
        'at least 4'
    """
    if not estimate.low and estimate.high is None:
        return "no interval" if estimate.resolved else "unresolved"
    if estimate.high is None:
        return f"at least {show_number(estimate.low)}"
    if estimate.low is None:
        return f"at most {show_number(estimate.high)}"
    return f"{show_number(estimate.low)}–{show_number(estimate.high)}"
