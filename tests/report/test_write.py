"""The written report: whole, self-contained, and deaf to what names try to say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from tests.report.planted import make_points, make_study

from rightbatch import load_workload, run_study, write_report
from rightbatch.cli import main
from rightbatch.errors import CorruptStateError, MissingExtraError, UsageError
from rightbatch.plan import Plan
from rightbatch.report.contents import collect_contents
from rightbatch.report.source import Source, open_source, read_points
from rightbatch.report.write import render_report
from rightbatch.store import write_record
from rightbatch.study.study import SCHEMA, Study

Captured = pytest.CaptureFixture[str]
HOSTILE = {
    "markup": "<b onmouseover=alert(1)>x</b><img src=https://example.com/x onerror=alert(1)>",
    "script": "</script><script>alert(1)</script><!--",
    "path": "../../../etc/passwd",
    "nul": "a\x00b\x1b[31m",
    "direction": "abc\u202egnp.exe\u2066",
    "long": "x" * 10_000,
    "template": "{{ 7*7 }}{% raw %}%{x}$`",
    "link": '<a href="javascript:alert(1)">x</a>" onclick="alert(1)',
    "quotes": "'\"&lt;&#60;",
    "lines": "a\u2028b\u2029\n\n# c | d",
}


LIBRARY = get_plotlyjs()
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    """Tags with their attributes, text by tag, and scripts; the library left out, as it is long."""

    def __init__(self, text: str) -> None:
        assert text.count(LIBRARY) == 1
        text = text.replace(LIBRARY, "LIBRARY")
        super().__init__(convert_charrefs=True)
        self.shape: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.shape.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def write_everywhere(record: Any, text: str) -> Any:
    """The record with every free text of a user replaced."""
    if isinstance(record, tuple):
        return tuple(write_everywhere(item, text) for item in record)
    if is_dataclass(record) and not isinstance(record, type):
        changed = {
            # What a study's answer is best in is looked up by its words.
            field.name: f"{text} seconds"
            if field.name == "because"
            else text
            if _is_free(field.name, getattr(record, field.name))
            else write_everywhere(getattr(record, field.name), text)
            for field in fields(record)
            if (field.init and isinstance(getattr(record, field.name), str | tuple))
            or is_dataclass(getattr(record, field.name))
        }
        changed = {
            name: tuple(f"{text} {name} {i}" for i in range(len(value)))
            if name in _LISTS
            else value
            for name, value in changed.items()
        }
        return replace(record, **changed)
    return record


_LISTS = {"engines", "warnings", "notes"}
_FREE = {
    "workload", "metric", "target", "note", "because", "source", "optimizer", "device", "platform",
    "processor", "started", "torch", "numpy", "python", "rightbatch", "sentence", "method",
}  # fmt: skip


def _is_free(name: str, value: object) -> bool:
    return name in _FREE and isinstance(value, str)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@pytest.fixture(scope="module")
def pages(source: Source, plan_source: Source) -> dict[str, str]:
    return {
        "study": render_report(collect_contents(source), "html"),
        "plan": render_report(collect_contents(plan_source), "html"),
    }


@pytest.mark.parametrize("kind", ["study", "plan"])
def test_the_page_opens_with_the_answer(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    shown = [text.strip() for text in page.texts if text.strip()]
    answer = "Best for planted: batch 100" if kind == "study" else "Train with batch"
    assert any(text.startswith(answer) for text in shown[:5])
    assert "Why" in shown and "Evidence and versions" in shown


@pytest.mark.parametrize("kind", ["study", "plan"])
def test_the_page_is_one_file_that_asks_for_nothing(pages: dict[str, str], kind: str) -> None:
    text = pages[kind]
    assert len(text.encode()) < 8e6
    page = Page(text)
    fetching = {"src", "href", "action", "data", "poster", "srcset", "background", "ping"}
    assert not [a for a in page.attributes if a[1] in fetching]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.shape}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(", page.scripts[2])
    assert "http" not in page.scripts[0] + page.scripts[2]


def test_plotly_is_there_once_and_only_named_scripts_run(pages: dict[str, str]) -> None:
    page = Page(pages["study"])
    assert len(page.scripts) == 3
    assert page.scripts[1] == "LIBRARY"
    policy = next(v for t, n, v in page.attributes if t == "meta" and v.startswith("default-src"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    for script in (LIBRARY, page.scripts[2]):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split(";")[1]


@pytest.mark.parametrize("kind", ["study", "plan"])
@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_never_markup(
    pages: dict[str, str], plan: Plan, name: str, kind: str
) -> None:
    text = HOSTILE[name]
    given = (
        Source(plan=None, study=write_everywhere(make_study(), text), points=make_points())
        if kind == "study"
        else Source(plan=write_everywhere(plan, text), study=None)
    )
    page, usual = Page(render_report(collect_contents(given), "html")), Page(pages[kind])
    # Each thing is where it was: no tag and no attribute more or fewer.
    assert page.shape == usual.shape
    assert page.scripts[1:] == usual.scripts[1:]
    for found in strings(page.figures["figures"]):
        assert not re.search(r"<(?!br>)", found)
        assert not UNSEEN.search(found) and len(found) < 2000
    everything = "".join(page.texts)
    assert not UNSEEN.search(everything)
    assert max(map(len, everything.split())) < 1000
    if name in {"markup", "script", "link", "template", "path"}:
        assert text in everything


def test_markdown_and_json_say_the_same(source: Source, tmp_path: Path) -> None:
    contents = collect_contents(source)
    data = json.loads(render_report(contents, "json"))
    assert data["schema"] == "rightbatch.report/1"
    assert data["answer"] == contents.answer
    assert [f["finding"] for f in data["figures"]] == [s.data.finding for s in contents.sections]
    cost = next(figure for figure in data["figures"] if figure["name"] == "cost-to-target")
    assert cost["sizes"][0]["steps"]["value"] == 4200
    text = render_report(contents, "md")
    assert text.startswith("# planted\n\n**Best for planted: batch 100")
    assert "| batch | steps | examples | seconds | met the target |" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_keeps_names_in_their_cells(name: str) -> None:
    study = write_everywhere(make_study(), HOSTILE[name])
    text = render_report(collect_contents(Source(plan=None, study=study)), "md")
    usual = render_report(collect_contents(Source(plan=None, study=make_study())), "md")
    assert "<script" not in text.replace("\\<", "") and "\x00" not in text
    assert [line[:2] for line in text.split("\n")] == [line[:2] for line in usual.split("\n")]


def test_a_study_is_read_from_its_folder_with_its_curves(tmp_path: Path) -> None:
    run_study(
        load_workload("max3"), batch_sizes=[50, "full"], learning_rates=[0.1, 1.0], seeds=2,
        epochs=3, run_directory=tmp_path,
    )  # fmt: skip
    path = write_report(tmp_path, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert Page(path.read_text(encoding="utf-8")).figures["figures"]["curves"]
    assert open_source(tmp_path / "study.json") == open_source(tmp_path)


def test_a_plan_is_read_from_its_file(plan: Plan, tmp_path: Path) -> None:
    write_record(tmp_path / "plan.json", plan, schema="rightbatch.plan/1")
    assert open_source(tmp_path) == open_source(tmp_path / "plan.json") == open_source(plan)
    write_report(tmp_path / "plan.json", tmp_path / "out.md")
    assert (tmp_path / "out.md").read_text().startswith("# quadratic")


def test_what_is_no_report_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to report in .* Pass the folder of a study"):
        open_source(tmp_path)
    with pytest.raises(UsageError, match=r"There is no file .*nope.json"):
        open_source(tmp_path / "nope.json")
    with pytest.raises(UsageError, match=r"not of a int. Pass one of these"):
        open_source(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"There is no folder .* Make it first"):
        write_report(study, tmp_path / "no" / "report.html")
    with pytest.raises(UsageError, match=r"The format is 'pdf'. Give html, md or json"):
        write_report(study, tmp_path / "report.pdf", format="pdf")  # pyright: ignore[reportArgumentType]
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(CorruptStateError, match="holds no checksum"):
        open_source(tmp_path)
    (tmp_path / "points.csv").write_text("batch_size,learning_rate\n1,zero\n")
    with pytest.raises(CorruptStateError, match=r"no table of evaluations: line 2"):
        read_points(tmp_path / "points.csv")


def test_a_missing_extra_is_named(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = collect_contents(Source(plan=None, study=study))
    monkeypatch.setattr("rightbatch.report.write.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"plotly is not installed.*rightbatch\[report\]"):
        render_report(contents, "html")
    assert render_report(contents, "md") and render_report(contents, "json")


def test_the_command_writes_and_says_where(
    study: Study, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(tmp_path / "study.json", study, schema=SCHEMA)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "The report: report.html\n"
    assert main(["report", "study.json", "--format", "md", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"schema": "rightbatch.report-file/1", "path": "report.md",
                    "bytes": (tmp_path / "report.md").stat().st_size}  # fmt: skip
    assert main(["report", "nothing", "--out", "x.json"]) == 2
    assert "There is no file 'nothing'" in capsys.readouterr().err
