"""Every Python example of the README and the docs is run, every command in them is read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import rightbatch
from rightbatch.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match["text"] for match in found if match["language"] == language]


def commands(program: str) -> list[str]:
    lines = [
        line for page in PAGES for text in blocks(page, "console") for line in text.split("\n")
    ]
    return [line.removeprefix("$ ") for line in lines if line.startswith(f"$ {program} ")]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As in a script or a notebook: what it defines must reach child processes from there.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(blocks(page, "python"), start=1):
        exec(compile(text, f"{page.name}, example {number}", "exec"), namespace)


@pytest.mark.parametrize("command", commands("rightbatch"))
def test_the_commands_are_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for module, function in (
        ("run_plan", "run"),
        ("run_plan", "replay"),
        ("run_train", "run"),
        ("run_probe", "run"),
        ("run_sharpness", "run"),
        ("run_report", "run"),
        ("run_study", "run"),
    ):

        def note(*_: Any, name: str = f"{module}.{function}", **__: Any) -> int:
            called.append(name)
            return 0

        monkeypatch.setattr(f"rightbatch.cli.{module}.{function}", note)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").touch()
    (tmp_path / "my-run").mkdir()
    arguments = shlex.split(command, comments=True)[1:]
    assert main(arguments) == 0
    assert called or arguments == ["workloads"]


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {shlex.split(line, comments=True)[1] for line in commands("make")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks(PAGES[0], "console")[0]
    assert re.findall(r"^\$ (make \w+)", first, re.MULTILINE)[:2] == ["make demo", "make test"]


def test_names_that_the_pages_use_are_public() -> None:
    for page in PAGES:
        used = set(re.findall(r"\brb\.([A-Za-z_]\w*)", page.read_text(encoding="utf-8")))
        assert used <= set(rightbatch.__all__)
