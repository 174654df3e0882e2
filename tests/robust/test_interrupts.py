"""Every program ends in one line, whenever Ctrl-C, SIGTERM or a closed terminal comes: which says what is kept."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from common.interrupts import SIGNALS
from common.run_state import list_states
from tests.runs import ROOT, film
from tests.training import arguments, write_stable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def hear_all():
    """A shell's background job ignores Ctrl-C, and one under nohup a closed terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def interrupt(argv, number, ready):
    """Start a program and send it, and the processes that it starts, the signal once ready() -> status, lines

    ready  or a number: seconds after it can answer at all
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    program = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, start_new_session=True,
                               preexec_fn=hear_all)
    wait_for(lambda: answers(program.pid), program)
    if callable(ready):
        wait_for(ready, program)
    else:
        time.sleep(ready)
    assert program.poll() is None, program.communicate()
    os.killpg(program.pid, number)
    said = program.communicate(timeout=60)[1]
    said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said)  # bars within bars move the cursor
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    return program.returncode, [line for line in lines if "%|" not in line and "?it" not in line]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_training_saves_its_state_first(number, tmp_path):
    stable, out = write_stable(tmp_path / "stable"), tmp_path / "a run"
    words = arguments(stable, out, "--steps", 9_999_999, "--save-every", 3)
    status, lines = interrupt(["train.py", *words], number, lambda: (out / "mfx-samples.png").exists())
    assert status == 128 + number and len(lines) == 1
    steps = int(list_states(out, "mfx")[-1].stem[-7:])
    assert lines[0] == (f"train.py: interrupted: the state after step {steps} is saved; "
                        f"python train.py --out '{out}' --resume goes on")
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("workers, seconds, number", [
    (1, None, signal.SIGTERM), (2, None, signal.SIGHUP), (2, 3, signal.SIGINT), (2, 4, signal.SIGHUP),
])  # fmt: skip
def test_data(workers, seconds, number, tmp_path):
    """Also while its workers import; nobody but the program itself says a word."""
    for seed in range(3):
        film(tmp_path / f"{seed}.mp4", seed=seed)
    out = tmp_path / "pairs"
    argv = ["data.py", *tmp_path.glob("*.mp4"), "--out", out, "--size", 64, "--pairs", 1000, "--workers", workers]
    ready = seconds or (lambda: list(out.glob("pairs-*.json")))
    status, lines = interrupt(argv, number, ready)
    assert status == 128 + number and len(lines) == 1 and "Traceback" not in lines[0]
    began = out.exists()
    assert not began or lines == ["data.py: interrupted: what is done is kept; the same command goes on"]
    assert not began or not list(out.glob(".*"))


def test_sample(tmp_path):
    argv = ["sample.py", "--prompt", "snow", "--steps", 1000, "--out", tmp_path / "out.png", "--device", "cpu"]
    status, lines = interrupt(argv, signal.SIGINT, 7)
    assert status == 130 and not list(tmp_path.iterdir())
    assert lines == ["sample.py: interrupted: pictures appear whole or not at all; the same command makes them anew"]


def test_reproduce_and_bench(tmp_path):
    for argv, what in (
        (["-m", "reproduce", "--only", "table1", "--out", tmp_path],
         "what is finished is kept; the same command goes on"),
        (["-m", "bench", "unet", "--model", "toy", "--rounds", "1000"], "nothing is kept but the rows above"),
    ):
        status, lines = interrupt(argv, signal.SIGTERM, 12)
        assert status == 143 and len(lines) == 1 and lines[0].endswith(f"interrupted: {what}"), lines
