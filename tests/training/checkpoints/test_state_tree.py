"""States as JSON data and tensors: exact round trips, refusals that name the place."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict, defaultdict
from enum import IntEnum
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rightbatch.errors import UsageError
from rightbatch.training.checkpoints.state_tree import MAX_DEPTH, flatten, unflatten


def bits(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return values.view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits, in a way that does not use the code under test."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        keys = [(type(key), key) for key in a] == [(type(key), key) for key in b]
        return keys and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def back(state: Any) -> Any:
    structure, tensors = flatten(state)
    stored = safetensors.torch.load(safetensors.torch.save(tensors))
    return unflatten(json.loads(json.dumps(structure, allow_nan=False)), stored)


# ------------------------------------------------------------------------------------- round trip

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.tensor(list(data), dtype=torch.uint8).view(dtype)
    tensor = flat.reshape(shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


any_text = st.text(st.characters(exclude_categories=()))
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(any_text | st.integers(), inner, max_size=3)
        | st.dictionaries(any_text, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=8,
)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_any_tree_comes_back_in_type_and_bits(state: Any) -> None:
    assert same(back(state), state)


@pytest.mark.parametrize(
    "state",
    [
        (1, [2, (3,), ()], {}),
        {0: "a", "0": "b", -1: True, "tuple": [1]},
        {"dict": [["a", 1]], "tensor": {"name": "0"}},
        [True, 1, 1.0, False, 0, 0.0, -0.0],
        [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 1 << 20_000],
        [math.nan, -math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2],
        struct.unpack("d", struct.pack("Q", 0x7FF8_0000_DEAD_BEEF))[0],
        ["\ud83d\ude00", "😀", "\udcff", "\0", "</script>\u2028"],
    ],
)
def test_values_that_json_confuses(state: Any) -> None:
    assert same(back(state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_and_zero_dimensional_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    one = torch.ones(dtype.itemsize, dtype=torch.uint8).view(dtype)
    state = [one.reshape(()), torch.empty((0, 3), dtype=dtype), one.expand(4)]
    assert same(back(state), state)


def test_the_layout_in_memory_comes_back() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (image, image.double().mT, image.to(torch.complex128).transpose(0, 3)):
        loaded = back(tensor)
        assert loaded.stride() == tensor.stride()
        assert same(loaded, tensor)


def test_views_and_lazy_conjugates_come_back_as_what_they_show() -> None:
    x = torch.arange(12.0).reshape(3, 4) * (1 + 2j)
    state = [x, x.conj(), x.conj().imag, x[1], x[:, 1], x[1:, ::2], x.mT]
    assert same(back(state), state)


def test_one_tensor_in_two_places_is_stored_once_and_is_one_again() -> None:
    tied = torch.randn(5)
    _, stored = flatten({"in": tied, "out": tied, "copy": tied.clone()})
    assert len(stored) == 2
    state = back({"in": tied, "out": tied.detach(), "copy": tied.clone()})
    state["in"].fill_(7)
    assert torch.equal(state["out"], torch.full((5,), 7.0))
    assert not torch.equal(state["copy"], state["out"])
    first, second = back([torch.empty(0), torch.empty(0)])
    assert first is not second


def test_no_two_stored_tensors_are_in_one_memory() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    _, stored = flatten([x, x[1], x[1:], x.flatten(), x.mT, x.detach()])
    assert len(stored) == 5
    assert len({tensor.untyped_storage().data_ptr() for tensor in stored.values()}) == 5


def test_what_is_loaded_owns_its_values_and_needs_no_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    assert back([x * 2])[0].grad_fn is None
    assert not back([x])[0].requires_grad


def test_a_state_dict_keeps_the_versions_of_its_modules() -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    loaded = back(state)
    assert same(loaded, state)
    assert loaded._metadata == state._metadata  # pyright: ignore[reportAttributeAccessIssue]
    assert type(loaded._metadata) is OrderedDict


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_the_gpu_come_back_on_the_cpu() -> None:
    x = torch.randn(4, 3, device="cuda")
    loaded = back([x, x.T, x])
    assert all(tensor.device.type == "cpu" for tensor in loaded)
    assert same(loaded, [x.cpu(), x.T.cpu(), x.cpu()])


# --------------------------------------------------------------------------------------- refusals


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: None, r"^optimizer\.state\.0\.closure is a function, which"),
        (print, r"0\.closure is a builtin_function"),
        (Level.LOW, r"0\.closure is a Level"),
        (torch.float32, r"0\.closure is a dtype"),
        ({1, 2}, r"0\.closure is a set"),
        (b"x", r"0\.closure is a bytes"),
        (1j, r"0\.closure is a complex"),
        (defaultdict(list), r"0\.closure is a defaultdict"),
        (torch.Size([1]), r"0\.closure is a Size"),
        (nn.Parameter(torch.ones(1)), r"0\.closure is a Parameter.*plain tensors \(x\.detach"),
        ([0, object()], r"0\.closure\.1 is a object"),
        ({(1, 2): 0}, r"0\.closure has the key \(1, 2\), a tuple\. Keys .* str or int"),
        ({True: 0}, r"0\.closure has the key True, a bool"),
        ({1.0: 0}, r"has the key 1\.0, a float"),
        (torch.eye(2).to_sparse(), r"0\.closure is a sparse or nested tensor"),
        (torch.empty(2, device="meta"), r"0\.closure is a meta tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_come_back_is_refused_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flatten({"optimizer": {"state": {0: {"closure": value}}}})


def test_the_state_itself_may_be_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^The state is a object"):
        flatten(object())


def test_a_tree_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = [loop]
    with pytest.raises(UsageError, match=r"^again\.0\.again… is nested more than 64 deep"):
        flatten(loop)


def test_the_deepest_tree_that_is_written_is_read() -> None:
    for wrap in (lambda x: [x], lambda x: (x,), lambda x: {"a": x}):
        state: Any = 0
        for _ in range(MAX_DEPTH):
            state = wrap(state)
        assert same(back(state), state)
        with pytest.raises(UsageError, match="nested more than"):
            flatten(wrap(state))


@pytest.mark.parametrize(
    "node",
    [
        {"object": "os.system"},
        {"tuple": [], "dict": []},
        {},
        {"dict": [["a", 1], ["a", 2]]},
        {"dict": [[None, 1]]},
        {"dict": [[True, 1]]},
        {"dict": [[[1], 1]]},
        {"dict": [[1, 2, 3]]},
        {"dict": 3},
        {"ordered": []},
        {"tuple": 3},
        {"int": "os"},
        {"int": 3},
        {"float": "00"},
        {"text": "zz"},
        {"tensor": {"name": "1"}},
        {"tensor": {"name": ["0"]}},
        {"tensor": {}},
        {"tensor": {"name": "0", "dtype": "os.system", "shape": [1]}},
        {"tensor": {"name": "0", "dtype": "torch.qint8", "shape": [8]}},
        {"tensor": {"name": "0", "dtype": "torch.float32", "shape": [2**40, 2**40]}},
        {"tensor": {"name": "0", "dtype": "torch.float32", "shape": [-1, -1]}},
        {"tensor": {"name": "0", "order": [0, 0]}},
        {"tensor": {"name": "0", "order": [0, 1]}},
    ],
    ids=str,
)
def test_a_node_of_no_known_form_is_refused(node: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError, IndexError, struct.error)):
        unflatten(node, {"0": torch.ones(8, dtype=torch.uint8)})


def test_nesting_beyond_what_is_written_is_refused() -> None:
    node: Any = 0
    for _ in range(MAX_DEPTH + 1):
        node = [node]
    with pytest.raises(ValueError, match="it is nested more than 64 deep"):
        unflatten(node, {})
