"""Whatever happens in the child, the parent lives and gets the right word for it."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import cloudpickle
import numpy as np
import psutil
import pytest
import torch

import rightbatch
from rightbatch.device import memory
from rightbatch.errors import ProbeError, WorkloadError
from rightbatch.isolate import Child, process, run_in_child
from rightbatch.isolate.transport import dump, load

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks and RLIMIT_DATA: Linux")


class Shop:
    """A class of a module that the child cannot import."""

    def __init__(self, price: int) -> None:
        self.price = price


@pytest.fixture(scope="module")
def child():
    """One child for all tests: each request has its own process anyway."""
    with Child({"numbers": torch.arange(6.0)}, memory_limit_bytes=700 * MIB) as child:
        yield child


def test_a_function_and_its_arguments_cross(child):
    offset = 10
    result = child.run(lambda shared, k: (shared["numbers"].sum() * k + offset).item(), 2)
    assert (result.verdict, result.value, result.message) == ("fits", 40.0, "")
    assert result.seconds > 0
    assert 50 * MIB < result.peak_bytes < 700 * MIB


def test_classes_of_unimportable_modules_cross_both_ways(child):
    result = child.run(lambda _shared, shop: [type(shop).__name__, shop.price], Shop(3))
    assert result.value == ["Shop", 3]


def test_run_in_child_needs_no_session():
    result = run_in_child(lambda a, b: a * b, 6, 7)
    assert result.value == 42
    assert result.limit_bytes <= psutil.virtual_memory().total


def test_requests_do_not_see_each_other(child):
    child.run(lambda shared: shared["numbers"].zero_())
    assert child.run(lambda shared: shared["numbers"].sum().item()).value == 15.0


def test_an_error_comes_back_with_its_type_and_traceback(child):
    result = child.run(lambda _shared: {}["missing"])
    assert (result.verdict, result.error_type, result.message) == ("error", "KeyError", "'missing'")
    assert "test_isolate_child.py" in result.traceback


@pytest.mark.parametrize(
    "allocate",
    [
        lambda _shared: torch.ones(1000 * MIB // 4),
        lambda _shared: np.ones(1000 * MIB // 8),
        lambda _shared: bytearray(1000 * MIB),
        lambda _shared: [bytes(1000) for _ in range(1_000_000)],
        lambda _shared: torch.nn.LSTM(64, 256)(torch.ones(200_000, 1, 64)),
    ],
    ids=["torch", "numpy", "bytes", "many small objects", "lstm"],
)
@linux
def test_exhausted_memory_is_oom_whoever_asked_for_it(child, allocate):
    result = child.run(allocate)
    assert result.verdict == "oom", result.traceback
    assert result.value is None


@linux
def test_the_peak_of_a_request_is_its_own(child):
    def work(_shared, num_bytes):
        block = torch.ones(num_bytes // 4)
        small = [torch.ones(100) for _ in range(20_000)]  # fragments the heap
        return len(block) + len(small)

    first = [child.run(work, size * MIB).peak_bytes for size in (5, 205, 5, 105)]
    assert first[1] - first[0] == pytest.approx(200 * MIB, abs=2 * MIB)
    assert first[2] - first[0] == pytest.approx(0, abs=2 * MIB)
    assert first[3] - first[0] == pytest.approx(100 * MIB, abs=2 * MIB)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_death_by_signal_is_killed_and_named(child, number):
    result = child.run(lambda _shared: os.kill(os.getpid(), number))
    assert (result.verdict, result.message) == (
        "killed",
        f"The child process died by signal {signal.Signals(number).name}.",
    )


def test_a_silent_exit_is_killed_and_its_code_named(child):
    result = child.run(lambda _shared: os._exit(7))
    assert (result.verdict, result.message) == (
        "killed",
        "The child process died with exit code 7.",
    )


def test_native_last_words_about_memory_are_oom(child):
    def abort(_shared):
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.kill(os.getpid(), signal.SIGABRT)

    result = child.run(abort)
    assert result.verdict == "oom"
    assert "bad_alloc" in result.traceback


def test_a_kill_by_the_kernel_is_oom(child, monkeypatch):
    counts = iter([4, 5])
    monkeypatch.setattr(memory, "num_kernel_kills", lambda: next(counts))
    result = child.run(lambda _shared: os.kill(os.getpid(), signal.SIGKILL))
    assert result.verdict == "oom"


def test_an_ambiguous_error_is_memory_only_where_none_was_left(child):
    def fail(_shared, num_bytes):
        hoard = torch.ones(num_bytes // 4)
        raise RuntimeError(f"could not execute a primitive {len(hoard)}"[:29])

    result = child.run(fail, 4 * MIB)
    assert (result.verdict, result.perhaps_memory) == ("error", True)
    room = 700 * MIB - result.peak_bytes
    assert child.run(fail, room - 8 * MIB).verdict == "oom"


def test_sys_exit_is_an_error_of_the_function(child):
    result = child.run(lambda _shared: sys.exit("enough"))
    assert (result.verdict, result.error_type, result.message) == ("error", "SystemExit", "enough")


def test_what_the_child_prints_does_not_disturb_the_protocol(child, capfd):
    def chatter(_shared):
        print("x" * 100_000, flush=True)
        os.write(1, b"y" * 1000)
        return sys.stdin.read()

    assert child.run(chatter).value == ""
    assert capfd.readouterr().out == ""


def test_too_slow_is_timeout_and_the_child_serves_on(child):
    result = child.run(lambda _shared: time.sleep(30), timeout_seconds=0.3)
    assert (result.verdict, result.message) == ("timeout", "It took longer than 0.3 s.")
    assert child.run(lambda _shared: 5).value == 5


def test_standing_still_is_noticed_and_working_is_not(child):
    stalled = child.run(lambda _shared: threading.Event().wait(), stall_seconds=0.5)
    assert stalled.verdict == "timeout"
    assert "no progress for 0.5 s" in stalled.message

    def work(_shared):
        end = time.process_time() + 1.2
        while time.process_time() < end:
            pass
        return "done"

    assert child.run(work, stall_seconds=0.5).value == "done"


def test_unpicklable_arguments_are_refused_in_one_sentence(child):
    with pytest.raises(WorkloadError, match=r"cannot be sent to a child process: .*lock.*inside"):
        child.run(lambda _shared, lock: lock, threading.Lock())
    with pytest.raises(WorkloadError, match="cannot be sent to a child process"):
        Child(x for x in range(3))


def test_unpicklable_results_are_an_error_not_a_crash(child):
    result = child.run(lambda _shared: threading.Lock())
    assert (result.verdict, result.error_type) == ("error", "WorkloadError")


class BreaksOnArrival:
    def __reduce__(self):
        return (exec, ("raise RuntimeError('broken on arrival')",))


class DiesOnArrival:
    def __reduce__(self):
        return (os._exit, (9,))


def test_what_breaks_while_it_is_loaded_is_typed_too():
    result = run_in_child(len, BreaksOnArrival())
    assert (result.verdict, result.message) == ("error", "broken on arrival")
    result = run_in_child(len, DiesOnArrival())
    assert (result.verdict, result.message) == (
        "killed",
        "The child process died with exit code 9.",
    )


class StartsThread:
    def __reduce__(self):
        code = "import threading, time; threading.Thread(target=time.sleep, args=[9], daemon=1)"
        return (exec, (f"{code}.start()",))


def test_where_loading_starts_threads_each_request_gets_a_fresh_interpreter():
    with Child(StartsThread()) as child:
        pids = [child.run(lambda _shared: os.getppid()).value for _ in range(2)]
    assert pids == [os.getpid(), os.getpid()]  # no server between


def test_a_child_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(process, "_BOOTSTRAP", "raise SystemExit('no libraries here')")
    with pytest.raises(ProbeError, match=r"did not start\. .*no libraries here"):
        run_in_child(len, "abc")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ProbeError, match=r"could not be started.*/nowhere/python"):
        run_in_child(len, "abc")


def test_without_a_fence_the_parent_watches_from_outside(monkeypatch):
    monkeypatch.setattr(memory, "can_fence", lambda _device: False)

    def hoard():
        blocks = []
        while True:  # slowly enough for a watch that looks every 0.1 s
            blocks.append(torch.ones(20 * MIB // 4))
            time.sleep(0.02)

    result = run_in_child(hoard, memory_limit_bytes=500 * MIB, timeout_seconds=20)
    assert result.verdict == "oom"
    assert result.message.startswith("Memory: it took ")


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_death(pids: list[int], seconds: float = 5.0) -> list[int]:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


@linux
def test_what_a_request_leaves_running_is_ended(child):
    def leave_behind(_shared):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        return subprocess.Popen(command, start_new_session=True).pid

    result = child.run(leave_behind)
    assert wait_for_death([result.value]) == []


def test_leaving_the_context_ends_the_child():
    with Child() as child:
        pid = child.run(lambda _shared: os.getpid()).value
        server = child.run(lambda _shared: os.getppid()).value
    assert wait_for_death([pid, server]) == []


SCRIPT = """
    import os, sys, time
    from rightbatch.isolate import run_in_child

    class Local:
        value = 41

    print(run_in_child(lambda: Local.value + 1).value)
"""


@pytest.mark.parametrize("how", ["script without a guard", "-c", "stdin"])
def test_main_modules_of_every_kind_work_and_run_once(tmp_path, how):
    code = textwrap.dedent(SCRIPT)
    script = tmp_path / "script.py"
    script.write_text(code)
    command = {"script without a guard": [str(script)], "-c": ["-c", code], "stdin": ["-"]}[how]
    done = subprocess.run(
        [sys.executable, *command], input=code, capture_output=True, text=True, check=True
    )
    assert done.stdout == "42\n"


HANG = """
    import os, signal, sys, time
    # A shell starts what it runs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pathlib import Path
    from rightbatch.isolate import run_in_child

    def hang(path):
        Path(path).write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(60)

    run_in_child(hang, sys.argv[1])
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans_when_the_parent_is_interrupted_or_killed(tmp_path, number):
    note = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANG), str(note)], stderr=subprocess.PIPE, text=True
    )
    while not (note.exists() and note.read_text().count(" ")):
        time.sleep(0.02)
        assert parent.poll() is None
    pids = [int(pid) for pid in note.read_text().split()]
    start = time.monotonic()
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=10)
    assert time.monotonic() - start < 2
    assert wait_for_death(pids) == []
    if number == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1  # the parent's, and none from the child


@linux
def test_sending_data_does_not_make_the_parent_grow():
    data = torch.ones(200 * MIB // 4)
    with Child(torch.ones(1)) as child:
        child.run(lambda _shared: None)
    memory.release_cached_memory()
    memory.reset_peak()
    before = memory.peak_bytes()
    with Child((data, data[: 50 * MIB // 4])) as child:
        assert child.run(lambda shared: shared[0].sum().item() / MIB).value == 50.0
    # Two threads' stacks are counted among the data.
    assert memory.peak_bytes() - before < 30 * MIB


def test_the_parents_settings_reach_the_child():
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    try:
        result = run_in_child(lambda: (torch.get_num_threads(), str(torch.get_default_dtype())))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert result.value == (3, "torch.float64")


TENSORS = {
    "large": torch.randn(300, 300),
    "view": torch.randn(300, 300)[10:20],
    "transposed": torch.randn(300, 200).t(),
    "bfloat16": torch.ones(40_000, dtype=torch.bfloat16),
    "complex": torch.randn(4, 4, dtype=torch.complex64),
    "conjugate": torch.randn(4, 4, dtype=torch.complex64).conj(),
    "bool": torch.ones(70_000, dtype=torch.bool),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "sparse": torch.eye(5).to_sparse(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_as_they_left(name):
    sent = TENSORS[name]
    received = load([bytearray(part) for part in dump(sent)])
    assert type(received) is type(sent)
    assert received.dtype == sent.dtype
    assert received.requires_grad == sent.requires_grad
    assert torch.equal(received.to_dense(), sent.to_dense())
    if sent.numel() and not sent.requires_grad and not sent.is_sparse and not sent.is_conj():
        received.zero_()  # writable


def test_one_object_stays_one_object():
    tensor, array = torch.randn(200, 200), np.ones((200, 200))
    a, b, c, d = load([bytearray(part) for part in dump((tensor, tensor, array, array))])
    assert a is b
    assert c is d
    c += 1


def test_modules_that_a_fresh_interpreter_would_find_travel_by_reference():
    assert len(dump(rightbatch.accuracy)[0]) < 100


def test_other_modules_travel_by_value(tmp_path, child):
    file = tmp_path / "outside.py"
    file.write_text("FACTOR = 3\ndef triple(_shared, x):\n    return FACTOR * x\n")
    spec = importlib.util.spec_from_file_location("outside", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["outside"] = module
    before = cloudpickle.list_registry_pickle_by_value()
    try:
        spec.loader.exec_module(module)
        assert child.run(module.triple, 4).value == 12
        # Nothing more stays registered with cloudpickle, which other programs use too.
        assert cloudpickle.list_registry_pickle_by_value() == before
    finally:
        del sys.modules["outside"]
