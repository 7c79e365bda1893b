"""Figures of the machine: step time, throughput, memory."""

from __future__ import annotations

import plotly.graph_objects as go

from rightbatch.laws.estimate import Estimate
from rightbatch.report.data.memory import Memory
from rightbatch.report.data.step_time import StepTimes
from rightbatch.report.figures.style import (
    BAND,
    BLUE,
    CHOSEN,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    axis,
    error_bars,
    log_axis,
    make_figure,
    size_axis,
)
from rightbatch.report.units import show_bytes, show_number, show_seconds

_MICRO = "micro-batch (examples at once)"


def plot_step_time(data: StepTimes) -> go.Figure:
    """Seconds of a step above, examples per second below.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(540)
    x = [size.micro_batch for size in data.sizes]
    times = [Estimate(value=s.seconds, low=s.low, high=s.high, n=s.n) for s in data.sizes]
    rates = [
        Estimate(value=s.micro_batch / s.seconds, low=s.micro_batch / s.high,
                 high=s.micro_batch / s.low, n=s.n)
        for s in data.sizes
    ]  # fmt: skip
    hover = [
        f"micro-batch {s.micro_batch:,}<br>{show_seconds(s.seconds)} "
        f"({show_seconds(s.low)}–{show_seconds(s.high)}), n = {s.n}<br>"
        f"{show_number(round(s.micro_batch / s.seconds))} examples per second"
        for s in data.sizes
    ]
    law_x = [batch for batch, _ in data.line]
    for suffix, measured, law in (
        ("", times, [seconds for _, seconds in data.line]),
        ("2", rates, [batch / seconds for batch, seconds in data.line]),
    ):
        place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "showlegend": not suffix}
        figure.add_scatter(x=law_x, y=law, mode="lines", line={"color": BLUE, "width": 2},
                           name="α + βB", hoverinfo="skip", **place)  # fmt: skip
        figure.add_scatter(
            x=x, y=[e.value for e in measured], error_y=error_bars(measured, INK), mode="markers",
            marker={"size": 9, "color": INK}, name="measured", hovertext=hover, hoverinfo="text",
            **place,
        )  # fmt: skip
        figure.add_shape(
            type="line", x0=data.chosen, x1=data.chosen, y0=0, y1=1, xref=f"x{suffix}",
            yref=f"y{suffix} domain", line={"color": CHOSEN, "dash": "dash", "width": 2},
        )  # fmt: skip
    knee = data.law.knee
    if knee.value is not None:
        high = min(knee.high or x[-1], x[-1])
        for suffix in ("", "2"):
            figure.add_shape(
                type="rect", x0=max(knee.low or x[0], x[0]), x1=high, y0=0, y1=1, layer="below",
                xref=f"x{suffix}", yref=f"y{suffix} domain", fillcolor=BAND, line={"width": 0},
            )  # fmt: skip
    ends = [(size.low, size.seconds, size.high) for size in data.sizes]
    seconds_axis = log_axis("seconds per step", [v for e in ends for v in e], show_seconds)
    rate_axis = log_axis("examples per second", [e.value for e in rates if e.value])
    figure.update_layout(
        yaxis={**seconds_axis, "domain": [0.56, 1.0]},
        yaxis2={**rate_axis, "domain": [0.0, 0.44], "anchor": "x2"},
        xaxis={**size_axis(x, ""), "anchor": "y"},
        xaxis2={**size_axis(x, _MICRO), "anchor": "y2"},
        legend={"y": -0.13},
    )
    return figure


_PATTERNS = ("", "/", ".", "x")


def plot_memory(data: Memory) -> go.Figure:
    """The parts of memory at each size that was run, the peaks, the limit and the ceiling.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(400)
    sizes = [trial.micro_batch for trial in data.trials]
    labels = [f"{size:,}" for size in sizes]
    added = {t.micro_batch: max(0, t.peak_bytes - data.baseline_bytes)
             for t in data.trials if t.peak_bytes is not None}  # fmt: skip
    stacked = sum(part.at(max(sizes)) for part in data.parts)
    scale, unit = _scale(max([stacked, *added.values()]))
    for part, colour, pattern in zip(
        data.parts, (BLUE, SKY, GREEN, ORANGE), _PATTERNS, strict=True
    ):
        figure.add_bar(
            x=labels, y=[part.at(size) / scale for size in sizes], name=part.name,
            marker={"color": colour, "pattern": {"shape": pattern, "size": 6}},
            hovertext=[f"micro-batch {size:,}<br>{part.name}: {show_bytes(part.at(size))}"
                       for size in sizes],
            hoverinfo="text",
        )  # fmt: skip
    fitting = [trial for trial in data.trials if trial.peak_bytes is not None]
    figure.add_scatter(
        x=[f"{trial.micro_batch:,}" for trial in fitting],
        y=[added[trial.micro_batch] / scale for trial in fitting],
        mode="markers", name="measured peak",
        marker={"symbol": "line-ew-open", "size": 26, "color": INK, "line": {"width": 3}},
        hovertext=[f"micro-batch {t.micro_batch:,}<br>peak {show_bytes(t.peak_bytes)}"
                   for t in fitting],
        hoverinfo="text",
    )  # fmt: skip
    top = max([stacked, *added.values()]) / scale
    broken = [trial for trial in data.trials if trial.peak_bytes is None]
    if broken:
        figure.add_scatter(
            x=[f"{trial.micro_batch:,}" for trial in broken], y=[top] * len(broken),
            mode="markers", name="does not fit",
            marker={"symbol": "x", "size": 12, "color": PURPLE},
            hovertext=[f"micro-batch {t.micro_batch:,}: {t.verdict}" for t in broken],
            hoverinfo="text",
        )  # fmt: skip
    limit = (data.limit_bytes - data.baseline_bytes) / scale
    if limit <= 3 * top:
        figure.add_hline(y=limit, line={"color": CHOSEN, "dash": "dash", "width": 2},
                         annotation_text=f"limit {show_bytes(data.limit_bytes)}")  # fmt: skip
    else:
        figure.add_annotation(
            text=f"limit {show_bytes(data.limit_bytes)}, far above ↑", x=0, y=1, xref="paper",
            yref="paper", showarrow=False, xanchor="left", yanchor="bottom",
            font={"color": MUTED, "size": 12},
        )  # fmt: skip
    figure.update_layout(
        barmode="stack",
        bargap=0.35,
        xaxis=axis(_MICRO, type="category"),
        yaxis=axis(f"memory that training adds ({unit})", rangemode="tozero"),
        margin={"t": 30},
    )
    return figure


def _scale(num_bytes: float) -> tuple[float, str]:
    """A unit in which the numbers are readable."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return float(1024**power), unit
    return 1.0, "B"
