"""Figures of learning rates: the map, the curves, and the rules."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import plotly.graph_objects as go

from rightbatch.laws.estimate import Estimate
from rightbatch.report.data.cells import RateCell
from rightbatch.report.data.rate_batch_map import RateBatchMap
from rightbatch.report.data.rate_loss import RateLoss
from rightbatch.report.data.rate_rules import RULE_NAMES, RateRules
from rightbatch.report.figures.style import (
    BLUE,
    CHOSEN,
    DASHES,
    GREEN,
    INK,
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
    plain,
    size_axis,
    size_colours,
)
from rightbatch.report.units import show_number

_RATE = "learning rate"
_LOSS_SCALE = [[0.0, "#08519c"], [0.5, "#6baed6"], [1.0, "#eff3ff"]]
"""Dark is a low loss. Not viridis: that is the batch size."""
_MOST_CELLS_WITH_TEXT = 60
_BAD = {"diverged": "x", "failed": "square", "missed": "triangle-up", "stopped": "circle"}
_ON_CELLS = "#3a3f47"
"""Of marks on the map, whose cells are the same on a dark page."""
_BAD_NAMES = {"diverged": "diverged", "failed": "failed", "missed": "target missed",
              "stopped": "stopped early"}  # fmt: skip


def plot_rate_batch_map(data: RateBatchMap) -> go.Figure:
    """The loss of every pair, with what went wrong, the stable edge and the chosen pair.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    cells = data.cells
    sizes = cells.sizes
    rates = sorted({cell.learning_rate for cell in cells.cells})
    by_pair = {(cell.batch_size, cell.learning_rate): cell for cell in cells.cells}
    height = max(330, 110 + 30 * len(rates))
    figure = make_figure(height)
    in_logs = all(c.loss.value is None or c.loss.value > 0 for c in cells.cells)
    # Columns and rows of the same width: both are geometric or nearly so, and text must fit.
    figure.add_heatmap(
        x=list(range(len(sizes))),
        y=list(range(len(rates))),
        z=[[_shade(by_pair.get((B, lr)), in_logs=in_logs) for B in sizes] for lr in rates],
        text=[[_cell_text(by_pair.get((B, lr)), len(by_pair)) for B in sizes] for lr in rates],
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertext=[[_cell_hover(data, by_pair.get((B, lr))) for B in sizes] for lr in rates],
        hoverinfo="text",
        colorscale=_LOSS_SCALE,
        showscale=False,
        xgap=2,
        ygap=2,
    )
    row = {rate: index for index, rate in enumerate(rates)}
    column = {size: index for index, size in enumerate(sizes)}
    _add_bad(figure, data, column, row)
    if data.edges:
        figure.add_scatter(
            x=[column[size] for size, _ in data.edges],
            y=[_place(rate, rates) + 0.5 for _, rate in data.edges],
            mode="lines+markers",
            line={"color": CHOSEN, "dash": "dash", "width": 2},
            marker={"symbol": "line-ew-open", "size": 26, "color": CHOSEN},
            name="stable edge",
            hovertext=[f"batch {size:,}: stable to {show_number(rate)}"
                       for size, rate in data.edges],
            hoverinfo="text",
        )  # fmt: skip
    if data.chosen is not None and data.chosen[0] in column and data.chosen[1] in row:
        # At the cell's corner, so that its number stays readable.
        where = column[data.chosen[0]] - 0.36, row[data.chosen[1]] + 0.18
        add_chosen(figure, *where, _pair(*data.chosen))
    ticks = {"showgrid": False}
    figure.update_layout(
        xaxis=axis("batch size (examples per update)", tickvals=list(range(len(sizes))),
                   ticktext=[f"{size:,}" for size in sizes], **ticks),
        yaxis=axis(_RATE, tickvals=list(range(len(rates))),
                   ticktext=[show_number(float(f"{rate:.3g}")) for rate in rates], **ticks),
    )  # fmt: skip
    figure.update_layout(legend={"y": -75 / height})
    return figure


def _place(rate: float, rates: list[float]) -> float:
    """Where a rate lies among the rows."""
    for index, (low, high) in enumerate(pairwise(rates)):
        if low <= rate < high:
            return index + math.log(rate / low) / math.log(high / low)
    return 0.0 if rate < rates[0] else len(rates) - 1.0


def _shade(cell: RateCell | None, *, in_logs: bool) -> float | None:
    if cell is None or cell.loss.value is None:
        return None
    return math.log10(cell.loss.value) if in_logs else cell.loss.value


def _cell_text(cell: RateCell | None, count: int) -> str:
    if cell is None or cell.loss.value is None or count > _MOST_CELLS_WITH_TEXT:
        return ""
    return f"{cell.loss.value:.2g}"


def _cell_hover(data: RateBatchMap, cell: RateCell | None) -> str:
    if cell is None:
        return "not tried"
    lines = (
        _pair(cell.batch_size, cell.learning_rate),
        interval_text(data.cells.loss_name, cell.loss),
        cell.outcome(has_target=data.cells.has_target),
        f"{cell.steps:,} steps",
    )
    return "<br>".join(lines)


def _pair(batch_size: int, rate: float) -> str:
    return f"batch {batch_size:,}, learning rate {show_number(rate)}"


def _add_bad(
    figure: go.Figure, data: RateBatchMap, column: dict[int, int], row: dict[float, int]
) -> None:
    """Marks at the right of cells whose trainings did not all end well."""
    for state, symbol in _BAD.items():
        hit = [c for c in data.cells.cells if c.state(has_target=data.cells.has_target) == state]
        if hit:
            figure.add_scatter(
                x=[column[cell.batch_size] + 0.42 for cell in hit],
                y=[row[cell.learning_rate] for cell in hit],
                mode="markers",
                marker={
                    "symbol": symbol,
                    "size": 9,
                    "color": CHOSEN if state == "diverged" else _ON_CELLS,
                    "line": {"color": "#ffffff", "width": 1},
                },
                name=_BAD_NAMES[state],
                hovertext=[_cell_hover(data, cell) for cell in hit],
                hoverinfo="text",
            )


def plot_rate_loss(data: RateLoss) -> go.Figure:
    """The loss against the learning rate, one curve per batch size.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    cells = data.cells
    colours = size_colours(cells.sizes)
    known = [c for c in cells.cells if c.loss.value is not None]
    losses = [c.loss.value for c in known if c.loss.value is not None] or [1.0]
    top = _above(losses)
    figure = make_figure(420)
    for index, size in enumerate(cells.sizes):
        mine = [c for c in known if c.batch_size == size]
        x = [c.learning_rate for c in mine]
        add_band(figure, x, [_clipped(c, top) for c in mine], faded(colours[size]))
        figure.add_scatter(
            x=x,
            y=[c.loss.value for c in mine],
            mode="lines+markers",
            line={"color": colours[size], "width": 2, "dash": DASHES[index % len(DASHES)]},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
            name=f"batch {size:,}",
            hovertext=[
                f"{_pair(c.batch_size, c.learning_rate)}<br>"
                f"{interval_text(cells.loss_name, c.loss)}<br>"
                f"{c.outcome(has_target=cells.has_target)}"
                for c in mine
            ],
            hoverinfo="text",
        )
        bad = [c for c in cells.at(size) if c.diverged or c.failed]
        if bad:
            figure.add_scatter(
                x=[c.learning_rate for c in bad],
                y=[top] * len(bad),
                mode="markers",
                cliponaxis=False,
                marker={"symbol": "x", "size": 9, "color": colours[size]},
                name=f"batch {size:,}: diverged",
                hovertext=[f"{_pair(size, c.learning_rate)}<br>"
                           f"{c.outcome(has_target=cells.has_target)}" for c in bad],
                hoverinfo="text",
            )  # fmt: skip
    pairs = {(c.batch_size, c.learning_rate): c.loss.value for c in known}
    if data.chosen in pairs and data.chosen is not None:
        add_chosen(figure, data.chosen[1], pairs[data.chosen] or 1.0, _pair(*data.chosen))
    figure.update_layout(
        xaxis=log_axis(_RATE, [c.learning_rate for c in cells.cells]),
        yaxis=loss_axis(cells.loss_name, [*losses, top]),
    )
    return figure


def _above(losses: list[float]) -> float:
    """A little above all losses: where what has none is drawn."""
    low, high = min(losses), max(losses)
    if low > 0:
        return high * (high / low) ** 0.06 * 1.05
    return high + 0.06 * ((high - low) or 1.0)


def _clipped(cell: RateCell, top: float) -> Estimate:
    """The interval within the picture: a wide one must not press the curves together."""
    loss = cell.loss
    if loss.low is None or loss.high is None or loss.value is None or loss.value <= 0:
        return loss
    floor = loss.value / 10
    return replace(loss, low=max(loss.low, floor), high=min(loss.high, top))


def plot_rate_rules(data: RateRules) -> go.Figure:
    """The best rate of each size, and what the rules say.

    Args:
        data: What it shows.

    Returns:
        The figure.
    """
    figure = make_figure(400)
    for line, colour, dash in zip(data.lines, (BLUE, GREEN), ("solid", "dash"), strict=False):
        figure.add_scatter(
            x=[size for size, _ in line.rates],
            y=[rate for _, rate in line.rates],
            mode="lines",
            line={"color": colour, "dash": dash, "width": 2},
            name=f"{RULE_NAMES[line.rule]} rule",
            hovertext=[f"{RULE_NAMES[line.rule]} rule: {_pair(*pair)}" for pair in line.rates],
            hoverinfo="text",
        )
    estimates = [size.learning_rate for size in data.sizes]
    figure.add_scatter(
        x=[size.batch_size for size in data.sizes],
        y=[estimate.value for estimate in estimates],
        error_y=error_bars(estimates, INK),
        mode="markers",
        marker={
            "symbol": ["circle-open" if size.at_edge else "circle" for size in data.sizes],
            "size": 9,
            "color": INK,
        },
        name="best measured",
        hovertext=[
            f"batch {plain(f'{size.batch_size:,}')}<br>{interval_text(_RATE, size.learning_rate)}"
            for size in data.sizes
        ],
        hoverinfo="text",
    )
    if data.chosen is not None:
        add_chosen(figure, *data.chosen, _pair(*data.chosen))
    rates = [rate for line in data.lines for _, rate in line.rates]
    ends = [end for e in estimates for end in (e.low, e.high, e.value) if end]
    figure.update_layout(
        xaxis=size_axis([size.batch_size for size in data.sizes]),
        yaxis=log_axis(_RATE, [*ends, *(r for r in rates if r <= 8 * max(ends))]),
    )
    return figure
