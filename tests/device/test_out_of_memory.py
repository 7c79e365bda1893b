"""Memory or not: a table of what is really raised, and of what must never be taken for it."""

import errno

import numpy as np
import pytest
import torch

from rightbatch.device.out_of_memory import is_out_of_memory, last_words_mean_out_of_memory

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total"),
    torch.cuda.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB (GPU 0; 10.76 GiB total)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB. GPU 0 has 15.98 GiB"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("XPU out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity"),
    RuntimeError(
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
    ),
    RuntimeError("level_zero backend failed with error: 39 (PI_ERROR_OUT_OF_HOST_MEMORY)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.51 GB, max allowed: 9.07 GB)"),
    RuntimeError("Invalid buffer size: 20.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("rocblas_status_memory_error"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 314572800 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: "
        "you tried to allocate 8589934592 bytes."
    ),
    RuntimeError("unable to mmap 4096 bytes from file </x>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes."),
    RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 1.0GiB on device ordinal 0"),
    RuntimeError(
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent "
        "call last):\nRuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"
    ),
    MemoryError(),
    np.exceptions.AxisError,  # replaced below by NumPy's own, raised for real
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    BlockingIOError(errno.ENOMEM, "Cannot allocate memory"),
    ExceptionGroup("ranks", [MemoryError(), RuntimeError("CUDA out of memory. Tried")]),
]

NOT_MEMORY = [
    ValueError("Expected more than 1 value per channel when training, got input size [1, 4]"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 9x9)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("out of resource: shared memory, Required: 163840, Hardware limit: 101376"),
    RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory"
    ),
    RuntimeError("Trying to backward through the graph a second time"),
    RuntimeError("stack expects each tensor to be equal size, but got [3] and [4]"),
    RuntimeError("can't start new thread"),
    ValueError("the report quotes: CUDA out of memory"),
    KeyError("out of memory"),
    IndexError("list index out of range"),
    OSError(errno.ENOSPC, "No space left on device"),
    FileNotFoundError(errno.ENOENT, "No such file"),
    ExceptionGroup("ranks", [MemoryError(), ValueError("shape")]),
    KeyboardInterrupt(),
]


def numpy_memory_error() -> MemoryError:
    try:
        np.ones(1 << 58, dtype=np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError("NumPy allocated 2^58 bytes")


MEMORY = [e if isinstance(e, BaseException) else numpy_memory_error() for e in MEMORY]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: f"{type(e).__name__}: {str(e)[:60]}")
def test_exhausted_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", NOT_MEMORY, ids=lambda e: f"{type(e).__name__}: {str(e)[:60]}")
def test_nothing_else_is(error):
    assert not is_out_of_memory(error)


def test_torch_on_this_machine_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_batch_norm_on_one_example_is_not_memory():
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        torch.nn.BatchNorm1d(4)(torch.randn(1, 4))
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("cupy.cuda.memory", "OutOfMemoryError", True),
        ("tensorflow.python.framework.errors_impl", "ResourceExhaustedError", True),
        ("jaxlib", "XlaRuntimeError", False),  # only with its RESOURCE_EXHAUSTED text
        ("shop", "OutOfMemoryError", False),
    ],
)
def test_types_are_recognised_by_who_defines_them(module, name, expected):
    kind = type(name, (Exception,), {"__module__": module})
    assert is_out_of_memory(kind("no wording here")) is expected


def test_the_explicit_cause_counts_and_the_accidental_context_does_not():
    try:
        try:
            raise MemoryError
        except MemoryError as memory:
            raise RuntimeError("the step failed") from memory
    except RuntimeError as wrapped:
        assert is_out_of_memory(wrapped)
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise KeyError("a bug in the handler")  # noqa: B904 - the missing cause is the case
    except KeyError as accidental:
        assert not is_out_of_memory(accidental)


def test_a_circle_of_causes_ends():
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert not is_out_of_memory(a)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'", True),
        ("OpenBLAS error: Memory allocation still failed after 10 retries, giving up.", True),
        ("MemoryError", True),
        ("mmap: Cannot allocate memory", True),
        ("Segmentation fault", False),
        ("ValueError: Expected more than 1 value per channel", False),
        ("", False),
    ],
)
def test_last_words(text, expected):
    assert last_words_mean_out_of_memory(text) is expected
