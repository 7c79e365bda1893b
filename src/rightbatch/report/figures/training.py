"""Figures of training: loss curves, the generalisation gap and the noise scale."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go

from rightbatch.report.data.curves import Curve, Curves, CurveStep
from rightbatch.report.data.gap import Gap
from rightbatch.report.data.noise import Noise
from rightbatch.report.figures.style import (
    BAND,
    BLUE,
    CHOSEN,
    DASHES,
    INK,
    MUTED,
    SYMBOLS,
    add_band,
    add_chosen,
    axis,
    error_bars,
    faded,
    interval_text,
    log_axis,
    loss_axis,
    make_figure,
    size_axis,
    size_colours,
)
from rightbatch.report.units import show_number, show_seconds

Against = Literal["epochs", "steps", "examples", "seconds"]
_MOST_MARKERS = 8


def plot_curves(data: Curves, against: Against) -> go.Figure:
    """The loss while training, one curve per batch size.

    Args:
        data: What it shows.
        against: The horizontal axis.

    Returns:
        The figure.
    """
    figure = make_figure(440)
    colours = size_colours([curve.batch_size for curve in data.curves])
    many = len({curve.batch_size for curve in data.curves}) < len(data.curves)
    places: list[float] = []
    losses: list[float] = []
    for index, curve in enumerate(data.curves):
        x = [_place(step, against) for step in curve.steps]
        places += x
        losses += _add_curve(figure, data, curve, x, colours[curve.batch_size], index, many=many)
    show = show_seconds if against == "seconds" else show_number
    title = "modelled time" if against == "seconds" else against
    figure.update_layout(
        xaxis=log_axis(title, places, show), yaxis=loss_axis("loss", losses),
        legend={"y": -0.2},
    )  # fmt: skip
    return figure


def _place(step: CurveStep, against: Against) -> float:
    if against == "steps":
        return step.step
    value = getattr(step, against)
    assert value is not None  # curves without seconds are not drawn against them
    return float(value)


def _add_curve(
    figure: go.Figure,
    data: Curves,
    curve: Curve,
    x: list[float],
    colour: str,
    index: int,
    *,
    many: bool,
) -> list[float]:
    """One curve: validation loss with its band, training loss dotted; returns its losses."""
    main = [s.val_loss if s.val_loss.resolved else s.train_loss for s in curve.steps]
    name = f"batch {curve.batch_size:,}"
    # Of a race with many runs at one size, the legend names the size once; hovering tells the rate.
    first = next(c for c in data.curves if c.batch_size == curve.batch_size) is curve
    chosen = (curve.batch_size, curve.learning_rate) == data.chosen
    symbols = {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7,
               "maxdisplayed": _MOST_MARKERS}  # fmt: skip
    group = name
    add_band(figure, x, main, faded(colour), legendgroup=group)
    if all(s.val_loss.resolved and s.train_loss.resolved for s in curve.steps):
        figure.add_scatter(
            x=x, y=[s.train_loss.value for s in curve.steps], mode="lines", legendgroup=group,
            line={"color": colour, "width": 1.2, "dash": "dot"}, showlegend=False,
            hovertext=[_hover(curve, s) for s in curve.steps], hoverinfo="text",
        )  # fmt: skip
    figure.add_scatter(
        x=x,
        y=[estimate.value for estimate in main],
        mode="lines+markers",
        line={"color": colour, "width": 3 if chosen else 2,
              "dash": "solid" if not many else DASHES[index % len(DASHES)]},
        marker=symbols,
        legendgroup=group,
        showlegend=first,
        name=name,
        hovertext=[_hover(curve, step) for step in curve.steps],
        hoverinfo="text",
    )  # fmt: skip
    if "diverged" in curve.ended:
        figure.add_scatter(
            x=x[-1:], y=[main[-1].value], mode="markers", name=f"{name}: {curve.ended}",
            marker={"symbol": "x", "size": 11, "color": CHOSEN}, legendgroup=group,
            hovertext=[curve.ended], hoverinfo="text",
        )  # fmt: skip
    if chosen and main[-1].value is not None:
        add_chosen(figure, x[-1], main[-1].value, name)
    return [estimate.value for estimate in main if estimate.value is not None]


def _hover(curve: Curve, step: CurveStep) -> str:
    lines = [
        f"batch {curve.batch_size:,}, learning rate {show_number(curve.learning_rate)}",
        f"{show_number(round(step.epochs, 3))} epochs, {step.step:,} steps, "
        f"{step.examples:,} examples",
    ]
    if step.train_loss.resolved:
        lines.append(interval_text("training loss", step.train_loss))
    if step.val_loss.resolved:
        lines.append(interval_text("validation loss", step.val_loss))
    return "<br>".join(lines)


def plot_gap(data: Gap) -> go.Figure:
    """Validation − training loss at the end, by batch size.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(350)
    gaps = [size.gap for size in data.sizes]
    figure.add_hline(y=0.0, line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.add_scatter(
        x=[size.batch_size for size in data.sizes],
        y=[gap.value for gap in gaps],
        error_y=error_bars(gaps, INK),
        mode="markers",
        marker={"size": 10, "color": BLUE},
        name="gap",
        hovertext=[
            f"batch {size.batch_size:,}<br>{interval_text('gap', size.gap)}<br>"
            f"{interval_text('validation loss', size.val_loss)}<br>"
            f"{interval_text('training loss', size.train_loss)}"
            for size in data.sizes
        ],
        hoverinfo="text",
    )
    mine = [size.gap.value for size in data.sizes if size.batch_size == data.chosen]
    if mine and mine[0] is not None and data.chosen is not None:
        add_chosen(figure, data.chosen, mine[0])
    figure.update_layout(
        xaxis=size_axis([size.batch_size for size in data.sizes]),
        yaxis=axis("validation − training loss"),
    )
    return figure


def plot_noise(data: Noise) -> go.Figure:
    """The noise scale along the warm training.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(360)
    known = [(step, scale) for step, scale in data.points if scale.value is not None]
    # Step 0 has no place on a logarithmic axis: the axis counts from 1.
    x = [step + 1 for step, _ in known]
    scales = [scale for _, scale in known]
    add_band(figure, x, scales, BAND)
    figure.add_scatter(
        x=x,
        y=[scale.value for scale in scales],
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        marker={"size": 9},
        name="noise scale",
        hovertext=[
            f"after {step:,} steps<br>{interval_text('noise scale', scale)}"
            for step, scale in known
        ],
        hoverinfo="text",
    )
    open_ended = [(step, s.low) for step, s in data.points if s.value is None and s.low]
    if open_ended:
        figure.add_scatter(
            x=[step + 1 for step, _ in open_ended],
            y=[low for _, low in open_ended],
            mode="markers",
            marker={"symbol": "triangle-up-open", "size": 11, "color": MUTED, "line": {"width": 2}},
            name="at least",
            hovertext=[f"after {step:,} steps: at least {show_number(low)}"
                       for step, low in open_ended],
            hoverinfo="text",
        )  # fmt: skip
    ends = [end for _, s in data.points for end in (s.value, s.low, s.high) if end]
    steps = [step for step, _ in data.points]
    figure.add_scatter(
        x=[steps[0] + 1, steps[-1] + 1], y=[data.chosen, data.chosen], mode="lines",
        line={"color": CHOSEN, "dash": "dash", "width": 2}, name=f"chosen batch {data.chosen:,}",
        hoverinfo="skip",
    )  # fmt: skip
    ticks = {"tickvals": [step + 1 for step in steps], "ticktext": [f"{step:,}" for step in steps]}
    figure.update_layout(
        xaxis={**log_axis("steps of the warm training", [step + 1 for step in steps]), **ticks},
        yaxis=log_axis("noise scale (examples)", [*ends, data.chosen]),
    )
    return figure
