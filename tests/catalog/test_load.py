"""What a person types: a catalog name, a file, a module; and what they mistype."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from rightbatch import Workload
from rightbatch.catalog import load_workload
from rightbatch.errors import WorkloadError

FILE = """
import torch
from torch import nn
from neighbour import WIDTH
from rightbatch import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.layer(x)

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)

def factory():
    return Workload(name="mine", make_model=Net, loss=loss,
                    train_data=(torch.randn(8, WIDTH), torch.arange(8) % 2))

mine = factory()
number = 3

def needs_more(x):
    return x

def broken():
    raise OSError("no data here")

def wrong():
    return Workload(name="mine", make_model=Net, train_data=[])
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "my_training.py"
    path.write_text(FILE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    yield path
    sys.modules.pop("neighbour", None)
    sys.modules.pop("my_training", None)


@pytest.mark.parametrize("name", ["mine", "factory"])
def test_a_workload_or_a_function_in_a_file(file: Path, name: str) -> None:
    workload = load_workload(f"{file}:{name}")
    assert isinstance(workload, Workload)
    assert workload.name == "mine"
    assert workload.num_examples == 8


def test_what_a_file_defines_reaches_another_process(file: Path) -> None:
    pickled = file.with_suffix(".pickle")
    pickled.write_bytes(cloudpickle.dumps(load_workload(f"{file}:mine")))
    code = (
        "import pickle, sys; w = pickle.load(open(sys.argv[1], 'rb')); m = w.build_model(0); "
        "sys.exit(int(float(w.loss_sum(m, w.train_data)[0]) <= 0))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(pickled)],
        env={"PYTHONPATH": str(file.parent), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0


def test_a_module_in_the_working_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load_workload("my_training:mine").name == "mine"


def test_a_catalog_name() -> None:
    assert load_workload("max3").name == "max3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mien", r"names 'mien', which is not defined there\. Did you mean mine\?"),
        ("zzz", r"names 'zzz', which is not defined there\. There are: mine\."),
        ("number", r"is a int, not a Workload\. Name a rightbatch\.Workload"),
        ("needs_more", r"'needs_more' in .* failed with TypeError: .*called without arguments"),
        ("broken", r"'broken' in .* failed with OSError: no data here"),
        ("wrong", r"has neither of `loss` and `compute_loss`"),
        ("Net", r"is a Net, not a Workload"),
    ],
)
def test_wrong_names_in_a_file(file: Path, name: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_workload(f"{file}:{name}")


def test_files_that_are_not_there_or_fail(file: Path) -> None:
    with pytest.raises(WorkloadError, match=r"no file .*Did you mean my_training\.py\?"):
        load_workload(f"{file.parent}/my_trainin.py:mine")
    with pytest.raises(WorkloadError, match=r"does not say which workload .*Write .*\.py:name"):
        load_workload(str(file))
    file.write_text("import torch\nraise SystemExit(3)\n")
    with pytest.raises(WorkloadError, match=r"failed while it was imported, with SystemExit: 3"):
        load_workload(f"{file}:mine")
    file.write_text("def (:\n")
    with pytest.raises(WorkloadError, match=r"failed while it was imported, with SyntaxError"):
        load_workload(f"{file}:mine")
    file.write_text("import not_installed_anywhere\n")
    with pytest.raises(WorkloadError, match=r"No module named 'not_installed_anywhere'"):
        load_workload(f"{file}:mine")


def test_modules_that_are_not_there() -> None:
    with pytest.raises(WorkloadError, match=r"no module 'no_such_package\.train'\. Run from"):
        load_workload("no_such_package.train:mine")
    with pytest.raises(WorkloadError, match=r"':mine' names no workload\. Write path/to"):
        load_workload(":mine")
    with pytest.raises(WorkloadError, match=r"'rightbatch:' names no workload"):
        load_workload("rightbatch:")
