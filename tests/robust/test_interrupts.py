"""Every program ends in one line, whenever Ctrl-C, SIGTERM or a closed terminal comes: which says what is kept."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from common.interrupts import SIGNALS, interruptible, kept_from_children
from common.run_state import list_states
from tests.robust.kill import list_children
from tests.runs import ROOT, film
from tests.training import arguments, write_stable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def hear_all():
    """A shell's background job ignores Ctrl-C, and one under nohup a closed terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def interrupt(argv, number, ready):
    """Start a program and send it, and the processes that it starts, the signal once ready() -> status, lines

    ready  or a number: seconds after it can answer at all; or what it has said by then
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as out:

        def read():
            return os.pread(said.fileno(), 10**6, 0).decode()

        program = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=env, stderr=said, stdout=out,
                                   start_new_session=True, preexec_fn=hear_all)
        wait_for(lambda: answers(program.pid), program)
        if isinstance(ready, float):
            time.sleep(ready)
        elif callable(ready):
            wait_for(lambda: ready(program.pid), program)
        else:
            wait_for(lambda: ready in read() or ready.encode() in os.pread(out.fileno(), 10**6, 0), program)
        assert program.poll() is None, read()
        os.killpg(program.pid, number)
        program.wait(timeout=60)
        lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", read()).replace("\r", "\n").splitlines()  # bars within bars move
    lines = [line for line in lines if line.strip() and "%|" not in line and "?it" not in line]
    return program.returncode, lines


def wait_for(ready, program):
    deadline = time.time() + 60
    while not ready() and program.poll() is None and time.time() < deadline:
        time.sleep(0.01)


def answers(process):
    """Whether it has an answer to SIGTERM: from a program's first lines on, while it imports for seconds"""
    with open(f"/proc/{process}/status") as file:
        caught = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
    return bool(caught >> signal.SIGTERM - 1 & 1)


PROGRAMS = (["train.py"], ["-m", "reproduce.train_toys", "vae"], ["data.py", "examples", "--out", "/nowhere"],
            ["sample.py", "--prompt", "x"], ["-m", "reproduce"], ["-m", "bench", "unet"],
            ["-m", "toy.clips", "/nowhere"])


@pytest.mark.parametrize("argv, number", list(zip(PROGRAMS, 3 * SIGNALS)), ids=str)
def test_while_a_program_imports(argv, number):
    status, lines = interrupt(argv, number, 0.2)
    name = " ".join(["python", *argv[:2]]) if argv[0] == "-m" else argv[0]
    assert (status, lines) == (128 + number, [f"{name}: interrupted before it began, or after it was done"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_saves_its_state_first(number, tmp_path):
    stable, out = write_stable(tmp_path / "stable"), tmp_path / "a run"
    words = arguments(stable, out, "--steps", 9_999_999, "--save-every", 3)
    status, lines = interrupt(["train.py", *words], number, lambda _: (out / "mfx-samples.png").exists())
    assert status == 128 + number and len(lines) == 1
    steps = int(list_states(out, "mfx")[-1].stem[-7:])
    assert lines[0] == (f"train.py: interrupted: the state after step {steps} is saved; "
                        f"python train.py --out '{out}' --resume goes on")
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("workers, moment, number", [
    (1, "pairs", signal.SIGTERM), (2, "pairs", signal.SIGHUP), (2, "workers", signal.SIGINT),
])  # fmt: skip
def test_data(workers, moment, number, tmp_path):
    """Also while its workers import; nobody but the program itself says a word."""
    for seed in range(3):
        film(tmp_path / f"{seed}.mp4", seed=seed)
    out = tmp_path / "pairs"
    argv = ["data.py", *tmp_path.glob("*.mp4"), "--out", out, "--size", 64, "--pairs", 1000, "--workers", workers]
    ready = {"pairs": lambda _: list(out.glob("pairs-*.json")), "workers": lambda pid: len(list_children(pid)) > 1}
    status, lines = interrupt(argv, number, ready[moment])
    assert status == 128 + number
    assert lines == ["data.py: interrupted: what is done is kept; the same command goes on"]
    assert not list(out.glob(".*"))


@pytest.fixture
def heard():
    """This process hears Ctrl-C, though a shell may have made it ignore that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_another_thread_takes_waits_until_a_process_has_started(heard):
    taken, started = threading.Event(), False

    def take():
        taken.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    other = threading.Thread(target=take)  # it does not inherit the mask
    other.start()
    with pytest.raises(KeyboardInterrupt), interruptible(), kept_from_children():
        taken.set()
        other.join()
        time.sleep(0.1)
        started = True
    assert started


@pytest.mark.parametrize("argv, number, begun, what", [
    (["sample.py", "--prompt", "snow", "--steps", 1000], signal.SIGINT, "%|",
     "pictures appear whole or not at all; the same command makes them anew"),
    (["-m", "reproduce", "--only", "table1"], signal.SIGTERM, "table1",
     "what is finished is kept; the same command goes on"),
    (["-m", "bench", "unet", "--model", "toy", "--rounds", "1000"], signal.SIGTERM, "unet:",
     "nothing is kept but the rows above"),
])  # fmt: skip
def test_the_others_while_they_work(argv, number, begun, what, tmp_path):
    out = [] if "bench" in argv else ["--out", tmp_path / ("out.png" if argv[0] == "sample.py" else "out")]
    status, lines = interrupt([*argv, *out, "--device", "cpu"], number, begun)
    assert status == 128 + number and len(lines) == 1 and lines[0].endswith(f"interrupted: {what}"), lines
    assert not list(tmp_path.glob("*.png"))
