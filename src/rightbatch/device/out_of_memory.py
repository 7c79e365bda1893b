"""Is this exception an exhausted memory, of whatever device, library and platform?

A false "yes" hides a bug of the workload behind a smaller batch; a false "no" ends a search that
had only met its limit. So the wordings are listed one by one, with who says them, and must come
from a type that its speaker really raises.
"""

from __future__ import annotations

import errno
import re

_RUNTIME_WORDINGS = re.compile(
    "|".join(
        (
            # Accelerators, as PyTorch's caching allocators and drivers word it.
            r"(CUDA|HIP|XPU|MPS backend|NPU|MUSA|HPU) out of memory",
            r"(CUDA|HIP|XPU)( driver)? error: (hip|cuda)?_?(error)?_?out[ _]of[ _]memory",
            r"CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|hipErrorOutOfMemory",
            r"(UR|PI|ZE)_(RESULT_)?ERROR_OUT_OF_(DEVICE|HOST)_MEMORY",
            r"Invalid buffer size: \d",  # Metal: one tensor is larger than any buffer may be
            # Their libraries.
            r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS|HIPSPARSE|MIOPEN)_(STATUS_)?ALLOC_FAILED",
            r"miopenStatusAllocFailed|rocblas_status_memory_error|HIPFFT_ALLOC_FAILED",
            # Host memory: Linux and macOS, then Windows.
            r"DefaultCPUAllocator: can't allocate memory",
            r"DefaultCPUAllocator: not enough memory",
            r"C10 Out of Memory",
            r"(std::)?bad_alloc\b|\bbad allocation\b",
            r"Cannot allocate memory",  # strerror(ENOMEM), inside messages about mmap
            # XLA (JAX), on any device.
            r"RESOURCE_EXHAUSTED: ",
        )
    ),
    re.IGNORECASE,
)
_TYPE_NAMES = {
    "OutOfMemoryError": ("torch", "cupy", "jaxlib", "jax"),
    "CudaOutOfMemoryError": ("torch",),
    "ResourceExhaustedError": ("tensorflow",),
}
_WINDOWS_CODES = frozenset({8, 14, 1455})  # ERROR_NOT_ENOUGH_MEMORY, _OUTOFMEMORY, COMMITMENT_LIMIT
_AMBIGUOUS = re.compile(
    r"can't start new thread|Resource temporarily unavailable|failed to map segment"
    r"|could not (create|execute) a (primitive|memory|stream|engine)",
)
_LAST_WORDS = re.compile(
    rf"{_RUNTIME_WORDINGS.pattern}|\bMemoryError\b|Memory allocation (still )?failed"
    r"|failed to map segment from shared object",
    re.IGNORECASE,
)


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether an exception means that memory ran out.

    Recognised: CUDA, HIP, XPU, MPS and host memory in PyTorch's words on Linux, macOS and Windows;
    failed allocations of cuBLAS, cuDNN and their ROCm twins; `MemoryError`, NumPy's included;
    `OSError` with ENOMEM; JAX's and TensorFlow's exhausted resources; any of these as the explicit
    cause (`raise … from …`) of another exception; a group made of nothing else. Nothing besides:
    a BatchNorm layer that refuses a single example has not run out of memory.

    Args:
        exception: What was raised.

    Returns:
        True if memory ran out.

    Example:
        >>> is_out_of_memory(RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"))
        True
        >>> is_out_of_memory(ValueError("Expected more than 1 value per channel when training"))
        False
    """
    seen: set[int] = set()
    current: BaseException | None = exception
    while current is not None and id(current) not in seen:
        if _says_so(current):
            return True
        seen.add(id(current))
        current = current.__cause__
    return False


def last_words_mean_out_of_memory(text: str) -> bool:
    """Whether what a dead process left on its standard error says that memory ran out.

    Native code does not raise: it prints, and aborts or exits.

    Args:
        text: The end of its standard error.

    Returns:
        True if memory ran out.

    Example:
        >>> last_words_mean_out_of_memory("terminate called after throwing 'std::bad_alloc'")
        True
    """
    return _LAST_WORDS.search(text) is not None


def may_be_starvation(exception: BaseException) -> bool:
    """Whether lack of memory is one of several things that an exception may mean.

    A thread that cannot start, a library that cannot be mapped or a oneDNN primitive that cannot
    be created say only that something could not be done. Whether memory was the reason shows in
    how much was left, or in another run with more.

    Args:
        exception: What was raised.

    Returns:
        True if it may have been memory.

    Example:
        >>> may_be_starvation(RuntimeError("could not execute a primitive"))
        True
        >>> may_be_starvation(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    return _AMBIGUOUS.search(str(exception)) is not None


def _says_so(exception: BaseException) -> bool:
    if isinstance(exception, BaseExceptionGroup):
        return all(is_out_of_memory(member) for member in exception.exceptions)
    if isinstance(exception, MemoryError) or _has_type_of_its_own(exception):
        return True
    if isinstance(exception, OSError):
        code = getattr(exception, "winerror", None)
        return exception.errno == errno.ENOMEM or code in _WINDOWS_CODES
    # JAX's exceptions are RuntimeErrors too.
    return (
        isinstance(exception, RuntimeError) and _RUNTIME_WORDINGS.search(str(exception)) is not None
    )


def _has_type_of_its_own(exception: BaseException) -> bool:
    """By name, so that nobody's library has to be imported to ask."""
    return any(
        kind.__module__.partition(".")[0] in _TYPE_NAMES.get(kind.__name__, ())
        for kind in type(exception).__mro__
    )
