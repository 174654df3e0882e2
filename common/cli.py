"""What all command lines share: a mistake is one line on the screen and exit status 2.

    parser = Parser(prog="sample.py")
    parser.add_argument("--image", type=file_name)
    parser.add_argument("--steps", type=number(int, 1, 1000))
    with report_errors(parser, "try a smaller --size", "no picture is saved"):
        check_needs(args, NEEDS)
        check_outputs([args.out], [args.image])
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from common import interrupts
from common.pictures import KINDS

WEIGHTS = Path(__file__).parent.parent / "weights"
NAME = 230  # bytes of a file's name: a temporary one is longer, and most systems take 255
TOY, TOY_MFX = WEIGHTS / "toy", WEIGHTS / "toy-mfx"  # the shipped models


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):  # the docstrings' own lines are kept
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextlib.contextmanager
def report_errors(parser, memory, kept="start again"):
    """with report_errors(parser, "try a smaller --size", "..."): one line for what a person can put right, or has
    interrupted.

    memory  what to do where there is too little of it
    kept    after an interrupt: what is kept, and how to go on; a text, or a function that returns one
    """
    with contextlib.suppress(AttributeError):  # a letter that cannot be shown is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with interrupts.interruptible(), contextlib.redirect_stderr(Stderr(sys.stderr)):
            yield
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        said = f"{parser.prog}: interrupted: {kept if isinstance(kept, str) else kept()}\n"
        parser.exit(128 + number, said if os.environ.get("RANK", "0") == "0" else None)  # torchrun starts many
    except Exception as e:
        line = explain(e, memory)
        if line is None:
            raise
        parser.error(line)


def explain(error, memory):
    """An exception -> a line for a person, who can put it right; None: nobody expected it

    memory  what to do where there is too little of it
    """
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[-1]  # the error of a worker process begins with its traceback
    # PyTorch has an error of its own for a GPU's memory, and none for others
    said = str(error) if isinstance(error, RuntimeError) else ""
    if "shared memory" in said:  # a process that loads ahead
        return "out of shared memory, /dev/shm: give it more, in Docker by --shm-size 8g or --ipc host"
    if isinstance(error, MemoryError) or re.search("out of memory|(allocate|enough) memory|ALLOC_FAILED", said):
        return f"out of memory: {memory}"
    return None


def tell(line):
    """A line on what is done, which stays done where no more can be told: a full log, a closed pipe."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = None


class Stderr:
    """For warnings and bars: what is said goes on without it, where it is closed or no more can be written to it."""

    def __init__(self, file):
        self.file = file or open(os.devnull, "w")  # 2>&-

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def shorten_warnings(parser):
    """From now on a warning is one line as well, above a bar that moves."""
    warnings.showwarning = lambda message, *_: tqdm.write(
        f"{parser.prog}: warning: {message}", file=sys.stderr
    )


# -------------------------------------------------------------------------------------------------
# Types of options, for add_argument


def number(kind, low, high):
    """int or float within these bounds."""

    def read(text):
        try:
            value = kind(text)
            if low <= value <= high:
                return value
        except ValueError:
            pass
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} in {low} .. {high}")

    return read


def file_name(text):
    """Anything but nothing: a shell makes "" of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: give one, or leave the option out")
    return text


def folder_name(text):
    return Path(file_name(text))


def picture_size(text):
    """'512' -> 512; '640x384' -> (640, 384)"""
    sides = [number(int, 8, 8192)(side) for side in text.lower().split("x", 1)]
    return tuple(sides) if len(sides) > 1 else sides[0]


# -------------------------------------------------------------------------------------------------
# Options beside each other


def given(args, names):
    """-> those of the options that are on the command line, as people write them: --change-map"""
    values = vars(args)
    there = [name for name in names if values[name] is not None and values[name] is not False]
    return ["--" + name.replace("_", "-") for name in there]


def check_needs(args, needs):
    """ValueError for an option without any of those that it needs beside it: {option: others}."""
    for option, others in needs.items():
        if given(args, [option]) and not given(args, others):
            either = join_names(["--" + name.replace("_", "-") for name in others])
            raise ValueError(f"{given(args, [option])[0]} needs {either} beside it")


def join_names(names):
    """-> 'a, b or c'"""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def check_outputs(outputs, inputs):
    """ValueError for a picture that cannot be written, or would replace an input or another."""
    taken = [os.path.realpath(path) for path in inputs if path]
    for path in [Path(path) for path in outputs if path]:
        if len(os.fsencode(path.name)) > NAME:
            raise ValueError(f"{path.name:.40}...: a name is at most {NAME} bytes long")
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"{path}: pictures are saved as {', '.join(KINDS)}")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"{path} cannot be written: is {path.parent} a folder that exists and is yours?"
            )
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{path} is there, and protected from being written over")
        if os.path.realpath(path) in taken:
            raise ValueError(f"{path} would be written over: each output needs a name of its own")
        taken.append(os.path.realpath(path))
