"""The one style of all figures: axes, colours, marks and hover text.

Batch size is always on a logarithmic axis with the sizes written out, and always viridis, small =
dark; other categories take the Okabe-Ito colours, which colour-blind people can tell apart. A
colour never stands alone: symbols and dashes differ as well. Figures are made for a light page;
`DARK` says what each colour becomes on a dark one, and the page's script exchanges them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from rightbatch.laws.estimate import Estimate
from rightbatch.report.shown import show_text
from rightbatch.report.units import show_interval, show_number

INK, MUTED, GRID = "#1c1e21", "#5f6670", "#e3e5e8"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"
CHOSEN = "#d55e00"
BAND, FAINT = "rgba(0,114,178,0.16)", "rgba(95,102,112,0.14)"
_DARK_BASE = {
    INK: "#e8eaed",
    MUTED: "#a4abb6",
    GRID: "#353a42",
    BLUE: "#5aaee6",
    CHOSEN: "#ff8a3d",
    BAND: "rgba(90,174,230,0.22)",
    FAINT: "rgba(164,171,182,0.20)",
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star-square")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SHADES = 32
_LIGHT_SPAN, _DARK_SPAN = (0.0, 0.86), (0.38, 1.0)
_MOST_SIZE_TICKS = 6.5
"""Labels that find room side by side on a telephone."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def _shades(span: tuple[float, float]) -> list[str]:
    points = [span[0] + (span[1] - span[0]) * k / _SHADES for k in range(_SHADES + 1)]
    return [str(colour).replace(" ", "") for colour in sample_colorscale("Viridis", points)]


_LIGHT, _DARK = _shades(_LIGHT_SPAN), _shades(_DARK_SPAN)


def _faded(colour: str) -> str:
    return colour.replace("rgb(", "rgba(").replace(")", ",0.16)")


DARK: dict[str, str] = {
    **_DARK_BASE,
    **dict(zip(_LIGHT, _DARK, strict=True)),
    **{_faded(a): _faded(b) for a, b in zip(_LIGHT, _DARK, strict=True)},
}
"""What each colour of a figure becomes on a dark page."""


def plain(text: object) -> str:
    """Text that Plotly shows as it is; it would read `<b>` and `<a href=…>` as markup.

    Args:
        text: Anything that may hold what users named.

    Returns:
        The text, escaped.

    Example:
        >>> plain("val_loss<=0.1")
        'val_loss&lt;=0.1'
    """
    return html.escape(show_text(str(text)), quote=False)


def size_colours(sizes: Iterable[int]) -> dict[int, str]:
    """A colour for each batch size: viridis, small = dark, by logarithm.

    Args:
        sizes: The sizes.

    Returns:
        By size.
    """
    logs = {size: math.log(size) for size in sizes}
    low, high = min(logs.values()), max(logs.values())
    span = (high - low) or 1.0
    return {size: _LIGHT[round(_SHADES * (x - low) / span)] for size, x in logs.items()}


def faded(colour: str) -> str:
    """The same colour for a band, for the colours of batch sizes."""
    return _faded(colour)


def make_figure(height: int, *, legend: bool = True) -> go.Figure:
    """An empty figure in the shared style.

    Args:
        height: Pixels.
        legend: Whether it has one.

    Returns:
        The figure.
    """
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 62, "r": 14, "t": 14, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _FONT, "size": 13, "color": INK},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 12}},
        hoverlabel={"align": "left", "font": {"family": _FONT, "size": 13}},
        hovermode="closest",
        dragmode=False,
    )
    return figure


def axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis in the shared style.

    Args:
        title: What it shows, with its unit.
        **options: More of Plotly's.

    Returns:
        What `update_layout` takes for an axis.
    """
    return {
        "title": {"text": plain(title), "standoff": 8, "font": {"size": 13}},
        "gridcolor": GRID,
        "linecolor": MUTED,
        "tickcolor": MUTED,
        "ticks": "outside",
        "tickfont": {"size": 12},
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
        **options,
    }


def size_axis(sizes: Iterable[int], title: str = "batch size (examples per update)") -> Any:
    """The axis of batch sizes: logarithmic, the sizes written out.

    Args:
        sizes: The sizes.
        title: Its title.

    Returns:
        The axis.
    """
    all_sizes = sorted(set(sizes))
    least = math.log(all_sizes[-1] / all_sizes[0]) / _MOST_SIZE_TICKS
    shown: list[int] = []
    for size in reversed(all_sizes):  # from the largest down, none so near that labels collide
        if not shown or math.log(shown[0] / size) >= least:
            shown.insert(0, size)
    pad = 0.06 * max(math.log10(all_sizes[-1] / all_sizes[0]), 1.0)
    ends = [math.log10(all_sizes[0]) - pad, math.log10(all_sizes[-1]) + pad]
    ticks = {"tickvals": shown, "ticktext": [f"{size:,}" for size in shown], "tickangle": 0}
    return axis(title, type="log", range=ends, **ticks)


def log_axis(
    title: str, values: Iterable[float], show: Callable[[float], str] = show_number
) -> Any:
    """A logarithmic axis with round numbers written out.

    Args:
        title: Its title, with the unit.
        values: All that is drawn on it; what is not positive is left out.
        show: How a number is written.

    Returns:
        The axis.
    """
    known = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = math.log10(min(known)), math.log10(max(known))
    pad = 0.08 * max(high - low, 0.3)
    low, high = low - pad, high + pad
    span = high - low
    digits = (1, 2, 5) if span < 2.6 else (1,)
    every = 1 if span < 7 else 2
    decades = range(math.floor(low), math.ceil(high) + 1, every)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    if len(ticks) < 2:
        ticks = [10**low, 10 ** ((low + high) / 2), 10**high]
    text = [show(float(f"{tick:.3g}")) for tick in ticks]
    return axis(title, type="log", range=[low, high], tickvals=ticks, ticktext=text)


def loss_axis(title: str, losses: Iterable[float]) -> Any:
    """An axis for losses: logarithmic, linear where one is not positive.

    Args:
        title: Its title.
        losses: All that is drawn on it.

    Returns:
        The axis.
    """
    all_losses = list(losses)
    return axis(title) if any(loss <= 0 for loss in all_losses) else log_axis(title, all_losses)


def error_bars(estimates: Sequence[Estimate], colour: str) -> dict[str, Any]:
    """Bars from the low to the high ends; an open end has none.

    Args:
        estimates: With values.
        colour: Of the bars.

    Returns:
        What a trace takes as `error_y` or `error_x`.
    """
    values = [estimate.value or 0.0 for estimate in estimates]
    pairs = list(zip(estimates, values, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if e.high is None else e.high - v for e, v in pairs],
        "arrayminus": [0.0 if e.low is None else v - e.low for e, v in pairs],
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }


def add_band(
    figure: go.Figure,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    colour: str,
    **options: Any,
) -> None:
    """A band between the ends of the intervals; what has no interval is left out.

    Args:
        figure: Where.
        x: Of each estimate.
        estimates: The estimates.
        colour: Of the band.
        **options: More of the trace's.
    """
    known = [(at, e.low, e.high) for at, e in zip(x, estimates, strict=True)
             if e.low is not None and e.high is not None]  # fmt: skip
    if len(known) < 2:
        return
    figure.add_scatter(
        x=[at for at, _, _ in known] + [at for at, _, _ in reversed(known)],
        y=[high for _, _, high in known] + [low for _, low, _ in reversed(known)],
        fill="toself",
        fillcolor=colour,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        **options,
    )


def add_chosen(figure: go.Figure, x: float, y: float, hover: str = "", **options: Any) -> None:
    """Marks the chosen point: in every figure the same star.

    Args:
        figure: Where.
        x: Its place.
        y: Its place.
        hover: More about it.
        **options: More of the trace's.
    """
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        marker={
            "symbol": "star",
            "size": 17,
            "color": CHOSEN,
            "line": {"color": "#ffffff", "width": 1.5},
        },
        name="chosen",
        cliponaxis=False,
        hovertext=[f"chosen<br>{hover}" if hover else "chosen"],
        hoverinfo="text",
        **options,
    )


def interval_text(name: str, estimate: Estimate) -> str:
    """A line of hover text: exact value, interval and count.

    Args:
        name: What it is.
        estimate: The estimate.

    Returns:
        Escaped text.
    """
    if estimate.value is None:
        return f"{plain(name)}: {show_interval(estimate)}"
    return (
        f"{plain(name)}: {show_number(estimate.value)} ({show_interval(estimate)}), "
        f"n = {estimate.n:,}"
    )
