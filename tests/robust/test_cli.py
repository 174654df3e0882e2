"""common/cli.py: wrong numbers, names and options, interrupts, errors."""

import argparse
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from common import cli
from common.interrupts import came, finish_steps


@pytest.fixture(autouse=True)
def heard():
    """These tests may themselves run under nohup, or in the background, which have signals ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("interrupt, status", [
    (lambda: signal.raise_signal(signal.SIGTERM), 143), (lambda: signal.raise_signal(signal.SIGHUP), 129),
    (lambda: signal.raise_signal(signal.SIGINT), 130), (lambda: signal.default_int_handler(2, None), 130),
])  # fmt: skip
def test_an_interrupt_is_one_line(capsys, interrupt, status):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, cli.report_errors(cli.Parser(prog="it"), "buy more", lambda: "all is kept"):
        interrupt()
    assert stop.value.code == status and capsys.readouterr().err == "it: interrupted: all is kept\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_that_becomes_another_error_is_still_one(capsys):
    """As inside torch.tensor."""
    with pytest.raises(SystemExit) as stop, cli.report_errors(cli.Parser(prog="it"), "buy more"):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert stop.value.code == 143 and capsys.readouterr().err == "it: interrupted: start again\n"
    with pytest.raises(SystemExit) as stop, cli.report_errors(cli.Parser(prog="it"), "buy more"):
        raise ValueError("the next one is an error again")
    assert stop.value.code == 2


def test_a_warning_beside_a_bar_has_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", None)
    cli.shorten_warnings(cli.Parser(prog="it"))
    with tqdm(total=2, file=sys.stderr):
        warnings.showwarning("look out", UserWarning, "file", 1)
    assert "it: warning: look out\n" in capsys.readouterr().err.split("\r")


@pytest.mark.parametrize("log", ["/dev/full", None])
def test_a_warning_that_cannot_be_written_is_no_failure(monkeypatch, log):
    if log and not Path(log).exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(sys, "stderr", log and open(log, "w"))
    with cli.report_errors(cli.Parser(prog="it"), "buy more"):
        for _ in range(2):
            print("it: warning: look out", end="", file=sys.stderr, flush=True)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.report_errors(cli.Parser(prog="it"), "buy more"):
            signal.raise_signal(signal.SIGHUP)  # nothing comes of it
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_interrupt_waits_for_the_step_and_the_second_does_not(capsys):
    done = []
    for times in (1, 2):
        with pytest.raises(SystemExit) as stop, cli.report_errors(cli.Parser(prog="it"), "buy more"):
            with finish_steps():
                for _ in range(times):
                    signal.raise_signal(signal.SIGTERM)
                done.append(times)
        assert stop.value.code == 143
    assert done == [1] and not came()


def test_a_result_that_is_protected_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out.png").touch()
    cli.check_outputs([tmp_path / "out.png"], [])
    monkeypatch.setattr(cli.os, "access", lambda path, mode: path != tmp_path / "out.png")  # root may write anywhere
    with pytest.raises(ValueError, match="out.png is there, and protected"):
        cli.check_outputs([tmp_path / "out.png"], [])


@pytest.mark.parametrize("text", ["0", "11", "2.5", "x", "nan"])
def test_a_number_out_of_its_range_is_told(text, capsys):
    parser = cli.Parser(prog="it")
    parser.add_argument("--n", type=cli.number(int, 1, 10))
    with pytest.raises(SystemExit) as e:
        parser.parse_args(["--n", text])
    assert e.value.code == 2
    assert capsys.readouterr().err == f"it: error: argument --n: {text!r} is not a whole number in 1 .. 10\n"


def test_names_and_sizes():
    assert cli.picture_size("512") == 512 and cli.picture_size("640X384") == (640, 384)
    wrong = ((cli.file_name, ""), (cli.folder_name, ""), (cli.picture_size, "7"), (cli.picture_size, "8x8x8"))
    for read, text in wrong:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_an_option_needs_another():
    needs = {"blur": ["mask", "change_map", "fan"], "hard": ["mask"]}
    args = SimpleNamespace(blur=0.0, hard=False, mask=None, change_map=None, fan=None)  # 0 is given, False is not
    with pytest.raises(ValueError, match="^--blur needs --mask, --change-map or --fan beside it$"):
        cli.check_needs(args, needs)
    args.change_map = "m.png"
    cli.check_needs(args, needs)
    args.hard = True
    with pytest.raises(ValueError, match="^--hard needs --mask beside it$"):
        cli.check_needs(args, needs)


@pytest.mark.parametrize("error, said", [
    (ValueError("a\nb"), "b"), (FloatingPointError(), "FloatingPointError"), (OSError(28, "full"), "[Errno 28] full"),
    (MemoryError(), "out of memory: buy more"), (RuntimeError("CUDA out of memory"), "out of memory: buy more"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: buy more"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory."),
     "out of shared memory, /dev/shm: give it more, in Docker by --shm-size 8g or --ipc host"),
])  # fmt: skip
def test_an_error_is_one_line(capsys, error, said):
    with pytest.raises(SystemExit) as stop, cli.report_errors(cli.Parser(prog="it"), "buy more"):
        raise error
    assert stop.value.code == 2 and capsys.readouterr().err == f"it: error: {said}\n"


def test_a_bug_keeps_its_traceback():
    for bug in ("shapes differ", "CUDA error: an illegal memory access was encountered"):
        with pytest.raises(RuntimeError, match=bug), cli.report_errors(cli.Parser(prog="it"), "buy more"):
            raise RuntimeError(bug)
