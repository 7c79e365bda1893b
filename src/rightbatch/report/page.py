"""The page: one HTML file with everything in it, that asks nothing of the network.

All text from records goes through Jinja's autoescaping, and through `style.plain` where Plotly
draws it. The figures' data stand in a JSON block, which is never executed. The page's policy lets
only the scripts run whose digests it names, and lets nothing be fetched at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rightbatch.report.contents import Contents, Section
from rightbatch.report.data.cost_to_target import CostToTarget
from rightbatch.report.data.curves import Curves
from rightbatch.report.data.gap import Gap
from rightbatch.report.data.memory import Memory
from rightbatch.report.data.noise import Noise
from rightbatch.report.data.pareto import Pareto
from rightbatch.report.data.rate_batch_map import RateBatchMap
from rightbatch.report.data.rate_loss import RateLoss
from rightbatch.report.data.rate_rules import RateRules
from rightbatch.report.data.step_time import StepTimes
from rightbatch.report.data.table import FigureData
from rightbatch.report.data.why import Why
from rightbatch.report.figures.costs import plot_cost_to_target, plot_pareto, plot_why
from rightbatch.report.figures.machine import plot_memory, plot_step_time
from rightbatch.report.figures.rates import plot_rate_batch_map, plot_rate_loss, plot_rate_rules
from rightbatch.report.figures.style import DARK
from rightbatch.report.figures.training import Against, plot_curves, plot_gap, plot_noise
from rightbatch.report.shown import show_text

_TEMPLATES = files("rightbatch.report") / "templates"


def draw(data: FigureData) -> tuple[tuple[str, go.Figure], ...]:
    """Draws the data of a figure.

    Args:
        data: Of any figure.

    Returns:
        Its views; one without a label where there is nothing to switch.

    Raises:
        TypeError: If the data are of no figure.
    """
    match data:
        case Curves():
            axes: list[Against] = ["epochs", "steps", "examples", "seconds"]
            axes = axes if data.has_seconds else axes[:-1]
            return tuple((against, plot_curves(data, against)) for against in axes)
        case CostToTarget():
            figure = plot_cost_to_target(data)
        case Gap():
            figure = plot_gap(data)
        case Memory():
            figure = plot_memory(data)
        case Noise():
            figure = plot_noise(data)
        case Pareto():
            figure = plot_pareto(data)
        case RateBatchMap():
            figure = plot_rate_batch_map(data)
        case RateLoss():
            figure = plot_rate_loss(data)
        case RateRules():
            figure = plot_rate_rules(data)
        case StepTimes():
            figure = plot_step_time(data)
        case Why():
            figure = plot_why(data)
        case _:
            raise TypeError(f"A {type(data).__name__} is not the data of a figure.")
    return (("", figure),)


def make_page(contents: Contents) -> str:
    """The whole page.

    Args:
        contents: What it says.

    Returns:
        HTML.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = show_text
    library, script = get_plotlyjs(), _read("report.js")
    views = {section.name: draw(section.data) for section in contents.sections}
    return environment.from_string(_read("report.html.j2")).render(
        contents=contents,
        views={name: [label for label, _ in drawn] for name, drawn in views.items()},
        heights={name: _plain(drawn[0][1])["layout"]["height"] for name, drawn in views.items()},
        tables={section.name: section.data.table() for section in contents.sections},
        style=Markup(_read("report.css")),
        library=Markup(library),
        script=Markup(script),
        figures=Markup(_as_json(contents.sections, views)),
        policy=_policy((library, script)),
    )


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _as_json(
    sections: Sequence[Section], views: dict[str, tuple[tuple[str, go.Figure], ...]]
) -> str:
    """The figures for the page's script, in a form that cannot end its block."""
    content: dict[str, Any] = {
        "dark": DARK,
        "figures": {
            section.name: [_plain(figure) for _, figure in views[section.name]]
            for section in sections
        },
    }
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(figure: go.Figure) -> dict[str, Any]:
    """A figure as what JSON knows."""
    return json.loads(str(figure.to_json()))


def _policy(scripts: Sequence[str]) -> str:
    """Only these scripts; nothing from elsewhere."""
    digests = [hashlib.sha256(script.encode("utf-8")).digest() for script in scripts]
    named = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    # Plotly sets the style of what it draws, which its own style sheet cannot be named for.
    return (
        f"default-src 'none'; script-src {named}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
