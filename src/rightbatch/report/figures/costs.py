"""Figures of what sizes cost: to the target, steps against examples, and why this batch."""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go

from rightbatch.laws.estimate import Estimate
from rightbatch.report.data.cost_to_target import CostToTarget, SizeCost
from rightbatch.report.data.pareto import Pareto
from rightbatch.report.data.why import SizeWhy, Why
from rightbatch.report.figures.style import (
    BAND,
    BLUE,
    INK,
    MUTED,
    add_chosen,
    error_bars,
    interval_text,
    log_axis,
    make_figure,
    plain,
    size_axis,
    size_colours,
)
from rightbatch.report.units import show_number, show_seconds

_PANELS: tuple[tuple[str, Callable[[SizeCost], Estimate], Callable[[float], str]], ...] = (
    ("steps", lambda size: size.steps, show_number),
    ("examples", lambda size: size.examples, show_number),
    ("seconds", lambda size: size.seconds, show_seconds),
)


def plot_cost_to_target(data: CostToTarget) -> go.Figure:
    """Three panels over one axis of batch sizes: steps, examples and seconds to the target.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    panels = [panel for panel in _PANELS if panel[0] != "seconds" or _has_seconds(data)]
    height = 120 + 210 * len(panels)
    figure = make_figure(height)
    share = 1.0 / len(panels)
    for row, (unit, of, show) in enumerate(panels):
        suffix = "" if row == 0 else str(row + 1)
        top = 1.0 - row * share
        values = _add_panel(figure, data, unit, of, suffix)
        title = f"{unit} to target" if unit != "seconds" else "modelled time to target"
        figure.update_layout({
            f"yaxis{suffix}": {**log_axis(title, values, show),
                               "domain": [top - share * 0.86, top], "anchor": f"x{suffix}"},
            f"xaxis{suffix}": {**size_axis([size.batch_size for size in data.sizes],
                                           _SIZES if row == len(panels) - 1 else ""),
                               "anchor": f"y{suffix}"},
        })  # fmt: skip
    figure.update_layout(legend={"y": -70 / height})
    return figure


_SIZES = "batch size (examples per update)"


def _has_seconds(data: CostToTarget) -> bool:
    return any(size.seconds.resolved for size in data.sizes)


def _add_panel(
    figure: go.Figure,
    data: CostToTarget,
    unit: str,
    of: Callable[[SizeCost], Estimate],
    suffix: str,
) -> list[float]:
    """One panel; returns what is drawn on its axis."""
    place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "showlegend": suffix == ""}
    critical = data.critical_batch
    if critical.value is not None and critical.low is not None and critical.high is not None:
        figure.add_shape(
            type="rect", x0=critical.low, x1=critical.high, y0=0, y1=1, xref=f"x{suffix}",
            yref=f"y{suffix} domain", fillcolor=BAND, line={"width": 0}, layer="below",
        )  # fmt: skip
    values: list[float] = []
    if data.law and unit != "seconds":
        column = 1 if unit == "steps" else 2
        law = [point[column] for point in data.law]
        values += law
        figure.add_scatter(
            x=[point[0] for point in data.law], y=law, mode="lines", name="fitted law",
            line={"color": BLUE, "width": 2}, hoverinfo="skip", **place,
        )  # fmt: skip
    known = [(size, of(size)) for size in data.sizes if of(size).value is not None]
    values += [end for _, e in known for end in (e.value, e.low, e.high) if end]
    figure.add_scatter(
        x=[size.batch_size for size, _ in known],
        y=[estimate.value for _, estimate in known],
        error_y=error_bars([estimate for _, estimate in known], INK),
        mode="markers",
        marker={"size": 9, "color": INK},
        name="measured",
        hovertext=[
            f"batch {size.batch_size:,}<br>{interval_text(unit, estimate)}<br>"
            f"{size.reached} of {size.trials} met {plain(data.target)}"
            for size, estimate in known
        ],
        hoverinfo="text",
        **place,
    )
    values += _add_missed(figure, data, unit, of, place)
    mine = [e for size, e in known if size.batch_size == data.chosen]
    if mine and data.chosen is not None:
        add_chosen(figure, data.chosen, mine[0].value or 1.0, interval_text(unit, mine[0]), **place)
    return values


def _add_missed(
    figure: go.Figure,
    data: CostToTarget,
    unit: str,
    of: Callable[[SizeCost], Estimate],
    place: dict[str, object],
) -> list[float]:
    """Sizes at which a training missed the target: an arrow at what they took without it."""
    missed = [size for size in data.sizes if of(size).value is None]
    if unit == "seconds" or not missed:
        return []
    at = [s.given_up_steps * (s.batch_size if unit == "examples" else 1) for s in missed]
    figure.add_scatter(
        x=[size.batch_size for size in missed],
        y=at,
        mode="markers",
        marker={"symbol": "triangle-up-open", "size": 11, "color": MUTED, "line": {"width": 2}},
        name="target missed: more than",
        cliponaxis=False,
        hovertext=[
            f"batch {size.batch_size:,}<br>{size.trials - size.reached} of {size.trials} missed "
            f"{plain(data.target)}<br>more than {show_number(value)} {unit}"
            for size, value in zip(missed, at, strict=True)
        ],
        hoverinfo="text",
        **place,
    )
    return [float(value) for value in at]


def plot_pareto(data: Pareto) -> go.Figure:
    """Steps against examples to the target, one point per batch size.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(400, legend=False)
    front = sorted(
        (size for size in data.sizes if size.batch_size in data.front),
        key=lambda size: size.examples.value or 0.0,
    )
    figure.add_scatter(
        x=[size.examples.value for size in front], y=[size.steps.value for size in front],
        mode="lines", line={"color": MUTED, "width": 1.5, "dash": "dot"}, hoverinfo="skip",
    )  # fmt: skip
    colours = size_colours([size.batch_size for size in data.sizes])
    for size in data.sizes:
        colour = colours[size.batch_size]
        on_front = size.batch_size in data.front
        figure.add_scatter(
            x=[size.examples.value],
            y=[size.steps.value],
            error_x=error_bars([size.examples], colour),
            error_y=error_bars([size.steps], colour),
            mode="markers+text",
            marker={"size": 11, "color": colour, "symbol": "circle" if on_front else "x"},
            text=[f"{size.batch_size:,}"],
            textposition="top right",
            hovertext=[
                f"batch {size.batch_size:,}<br>{interval_text('steps', size.steps)}<br>"
                f"{interval_text('examples', size.examples)}"
            ],
            hoverinfo="text",
        )
        if size.batch_size == data.chosen:
            add_chosen(figure, size.examples.value or 1.0, size.steps.value or 1.0)
    ends = {
        name: [end for size in data.sizes for e in (getattr(size, name),)
               for end in (e.value, e.low, e.high) if end]
        for name in ("steps", "examples")
    }  # fmt: skip
    figure.update_layout(
        xaxis=log_axis("examples to target", ends["examples"]),
        yaxis=log_axis("steps to target", ends["steps"]),
    )
    return figure


_BASES = {
    "trained": ("circle", "trained to the target"),
    "compared": ("diamond", "compared on the way"),
    "predicted": ("circle-open", "predicted, not run"),
}


def plot_why(data: Why) -> go.Figure:
    """The cost of each size against the chosen one's.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(400)
    if data.near_best is not None:
        figure.add_vrect(
            x0=data.near_best[0] / 1.2, x1=data.near_best[1] * 1.2, fillcolor=BAND,
            line={"width": 0}, layer="below",
        )  # fmt: skip
    figure.add_hline(y=1.0, line={"color": MUTED, "width": 1, "dash": "dot"})
    values = [1.0]
    for basis, (symbol, name) in _BASES.items():
        mine = [size for size in data.sizes if size.basis == basis and size.cost.resolved]
        if mine:
            costs = [size.cost for size in mine]
            values += [end for e in costs for end in (e.value, e.low, e.high) if end]
            figure.add_scatter(
                x=[size.batch_size for size in mine],
                y=[cost.value for cost in costs],
                error_y=error_bars(costs, INK if basis != "predicted" else MUTED),
                mode="markers",
                marker={"symbol": symbol, "size": 10, "color": BLUE, "line": {"width": 2}},
                name=name,
                hovertext=[_why_hover(size, data.unit) for size in mine],
                hoverinfo="text",
            )
    missed = [size for size in data.sizes if not size.cost.resolved]
    if missed:
        top = max(values) * 1.1
        values.append(top * 1.1)
        figure.add_scatter(
            x=[size.batch_size for size in missed],
            y=[top] * len(missed),
            mode="markers",
            marker={"symbol": "triangle-up-open", "size": 11, "color": MUTED, "line": {"width": 2}},
            name="target missed",
            hovertext=[f"batch {size.batch_size:,}: the target was missed" for size in missed],
            hoverinfo="text",
        )
    add_chosen(figure, data.chosen, 1.0, f"batch {data.chosen:,}")
    figure.update_layout(
        xaxis=size_axis([size.batch_size for size in data.sizes]),
        yaxis=log_axis(f"{data.unit} to target, × the chosen", values, lambda x: f"{x:g} ×"),
    )
    return figure


def _why_hover(size: SizeWhy, unit: str) -> str:
    return (
        f"batch {size.batch_size:,} ({size.basis})<br>{interval_text(f'{unit} ×', size.cost)}<br>"
        f"{interval_text('steps ×', size.steps)}"
    )
