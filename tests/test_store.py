"""Records on disk: exact round trips, every damage noticed, no half-written file."""

from __future__ import annotations

import errno
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightbatch import Recipe
from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.store import (
    decode,
    dump_record,
    encode,
    hash_tensors,
    make_run_directory,
    read_record,
    safe_name,
    write_atomically,
    write_record,
)

SCHEMA = "rightbatch.toy/1"


@dataclass(frozen=True, kw_only=True)
class Toy:
    name: str
    recipe: Recipe
    noise: Estimate
    sizes: tuple[int, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    note: str | None = None


TOY = Toy(
    name="digits é 数 \u202e </script>",
    recipe=Recipe(global_batch=256, micro_batch=64, learning_rate=1e-5),
    noise=Estimate(value=0.1 + 0.2, low=1e-300, n=12, method="per example"),
    sizes=(1, 2, 4096),
    rates={"a": 1e22, "b": 5e-324},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "toy.json"
    write_record(path, TOY, schema=SCHEMA)
    return path


def test_round_trip_is_exact(path: Path) -> None:
    assert read_record(path, Toy, schema=SCHEMA) == TOY


def test_the_file_is_plain_json_with_its_schema_first(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert next(iter(content)) == "schema"
    assert list(content)[-1] == "sha256"
    assert content["schema"] == SCHEMA
    assert content["recipe"]["accumulation"] == 4
    assert content["noise"]["high"] is None


def test_writing_twice_gives_the_same_bytes(path: Path) -> None:
    first = path.read_bytes()
    write_record(path, read_record(path, Toy, schema=SCHEMA), schema=SCHEMA)
    assert path.read_bytes() == first
    assert [*path.parent.iterdir()] == [path]


@given(
    st.dictionaries(
        st.text().filter(lambda key: key != "sha256"),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
    )
)
def test_any_content_survives(content: dict[str, Any]) -> None:
    assert decode(encode(content), source="x") == content


def test_every_one_of_many_flipped_bits_is_noticed(path: Path) -> None:
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptStateError, match=r"toy\.json (is not|does not|holds no)"):
            read_record(path, Toy, schema=SCHEMA)


def test_every_truncation_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptStateError, match=r"toy\.json"):
            read_record(path, Toy, schema=SCHEMA)
    path.write_bytes(whole + b"\n")
    with pytest.raises(CorruptStateError, match="does not match its checksum"):
        read_record(path, Toy, schema=SCHEMA)


def test_an_edited_number_and_a_change_that_json_does_not_see_are_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for old, new in ((b"4096", b"4097"), (b"1e-05", b"1E-05"), (b'"n": 12', b'"n":  12')):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(CorruptStateError, match="damaged, cut short or edited"):
            read_record(path, Toy, schema=SCHEMA)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe\x00", b"[]", b"3", b"[" * 100_000, b'{"schema": "rightbatch.toy/1"}']
)
def test_foreign_files_are_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(CorruptStateError, match=r"toy\.json"):
        read_record(path, Toy, schema=SCHEMA)


@pytest.mark.parametrize(
    "data", [b"cos\nsystem\n(S'touch pwned'\ntR.", b"!!python/object/apply:os.system"]
)
def test_nothing_that_is_read_runs(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    path.write_bytes(data)
    with pytest.raises(CorruptStateError):
        read_record(path, Toy, schema=SCHEMA)


def test_another_kind_or_version_of_record_is_a_mistake_of_use(path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds a .*toy/1', not a .*plan/1'"):
        read_record(path, Toy, schema="rightbatch.plan/1")
    with pytest.raises(UsageError, match=r"has the schema .*toy/1' and this .*toy/2"):
        read_record(path, Toy, schema="rightbatch.toy/2")


def test_a_sound_file_that_holds_another_record(path: Path) -> None:
    content = dump_record(TOY, schema=SCHEMA)
    path.write_bytes(encode({**content, "sizes": ["many"]}))
    with pytest.raises(CorruptStateError, match=r"is no rightbatch\.toy/1: sizes\.0: Input should"):
        read_record(path, Toy, schema=SCHEMA)
    path.write_bytes(encode({**content, "recipe": {**content["recipe"], "micro_batch": 7}}))
    with pytest.raises(CorruptStateError, match=r"recipe: .*not the global batch 256"):
        read_record(path, Toy, schema=SCHEMA)
    path.write_bytes(encode({**content, "extra": 1}))
    with pytest.raises(CorruptStateError, match="holds fields that"):
        read_record(path, Toy, schema=SCHEMA)
    path.write_bytes(encode({**content, "sizes": ["1"]}))
    with pytest.raises(CorruptStateError, match="holds fields that"):
        read_record(path, Toy, schema=SCHEMA)


def test_what_cannot_be_a_record() -> None:
    @dataclass
    class Clash:
        sha256: str = ""

    with pytest.raises(ValueError, match=r"write it like 'rightbatch\.plan/1'"):
        dump_record(TOY, schema="plan")
    with pytest.raises(ValueError, match="A dict is no record"):
        dump_record({}, schema=SCHEMA)
    with pytest.raises(ValueError, match="has a field 'sha256'"):
        dump_record(Clash(), schema=SCHEMA)
    with pytest.raises(ValueError, match=r"[Oo]ut of range float|JSON compliant"):
        encode({"x": float("nan")})


# ------------------------------------------------------------------------------ failing writes


class _Failing:
    """Makes the Nth system call of a write fail."""

    def __init__(self, fail_at: int, code: int) -> None:
        self.calls, self.fail_at, self.code = 0, fail_at, code

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_whatever_call_fails_the_file_is_old_or_new_and_the_error_names_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    new = Toy(name="new", recipe=TOY.recipe, noise=TOY.noise)
    for fail_at in range(1, 9):
        write_record(path, TOY, schema=SCHEMA)
        failing = _Failing(fail_at, code)
        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "close", "replace"):
                patch.setattr(os, name, failing.wrap(getattr(os, name)))
            with pytest.raises(OSError, match=r"Could not write: .*toy\.json"):
                write_record(path, new, schema=SCHEMA)
        assert read_record(path, Toy, schema=SCHEMA) in (TOY, new)
        assert [*path.parent.iterdir()] == [path], "a temporary file was left behind"
    # Eight calls make a write: open, write, fsync, close, replace, and open, fsync, close.
    failing = _Failing(9, code)
    with monkeypatch.context() as patch:
        for name in ("open", "write", "fsync", "close", "replace"):
            patch.setattr(os, name, failing.wrap(getattr(os, name)))
        write_record(path, new, schema=SCHEMA)
    assert failing.calls == 8


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:3])))
    write_record(path, TOY, schema=SCHEMA)
    assert read_record(path, Toy, schema=SCHEMA) == TOY


def test_a_device_that_keeps_something_else_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data).replace(b"1", b"2")))
    with pytest.raises(OSError, match="read back is not what was written"):
        write_record(path, TOY, schema=SCHEMA)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x + b"0", lambda x: x[:-1] + b"1"])
def test_what_is_read_back_is_compared_to_the_last_byte(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    data = b"0" * (1 << 20)
    write_atomically(path, data)
    replace = os.replace

    def replace_by_another(source: Path, target: Path) -> None:
        source.write_bytes(change(data))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_by_another)
    with pytest.raises(OSError, match="read back is not what was written"):
        write_atomically(path, data)


def test_a_write_takes_no_second_copy_of_the_data_in_memory(path: Path) -> None:
    data = bytes(20_000_000)
    tracemalloc.start()
    try:
        write_atomically(path, data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4_000_000


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No such file.*missing/toy\.json"):
        write_atomically(tmp_path / "missing" / "toy.json", b"x")


def test_the_file_gets_ordinary_permissions(path: Path) -> None:
    plain = path.with_name("plain")
    plain.write_text("x")
    assert path.stat().st_mode == plain.stat().st_mode


# ----------------------------------------------------------------------------- run directories


@pytest.mark.parametrize(
    "name",
    ["../../etc", "", ".", "..", "a\0b", "x" * 10_000, "\u202edigits", "</script>", "-rf", "a/b"],
)
def test_hostile_names_stay_inside_the_root(tmp_path: Path, name: str) -> None:
    folder = make_run_directory(tmp_path / "runs", name)
    assert folder.parent == tmp_path / "runs"
    assert folder.is_dir()
    assert len(folder.name) < 80
    assert not safe_name(name).startswith((".", "-"))


def test_runs_of_one_second_do_not_meet(tmp_path: Path) -> None:
    folders = [make_run_directory(tmp_path, "digits") for _ in range(5)]
    assert len(set(folders)) == 5


# ------------------------------------------------------------------------------------- tensors


def test_the_digest_of_tensors_sees_names_dtypes_shapes_and_bits() -> None:
    x = torch.arange(6.0)
    variants = [
        {"w": x},
        {"v": x},
        {"w": x.double()},
        {"w": x.bfloat16()},
        {"w": x.reshape(2, 3)},
        {"w": torch.nextafter(x, x + 1)},
        {"w": x, "b": x},
        {"w": -torch.zeros(6)},
        {"w": torch.zeros(6)},
        {"w": torch.tensor(0.0)},
    ]
    digests = [hash_tensors(variant.items()) for variant in variants]
    assert len(set(digests)) == len(variants)
    assert hash_tensors({"b": x, "w": x}.items()) == digests[6]
    assert hash_tensors({"w": x.reshape(2, 3).T.contiguous().T}.items()) == digests[4]
