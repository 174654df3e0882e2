"""What every program's command line shares: an error is one line and exit status 2, and so are the program's own.

    parser = Parser(prog="sample.py")
    parser.add_argument("--steps", type=number(int, 1, 1000))
    with report_errors(parser, "try a smaller --size"): ...
"""

import argparse
import contextlib
from pathlib import Path

TOY, TOY_MFX = (Path(__file__).parent.parent / "weights" / name for name in ("toy", "toy-mfx"))  # the shipped models


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high):
    """A `type` for add_argument: int or float within these bounds."""

    def read(text):
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} in {low} .. {high}")

    return read


@contextlib.contextmanager
def report_errors(parser, memory):
    """with report_errors(parser, "try a smaller --size"): what a person can put right is told in one line, with exit
    status 2. `memory` is what to do where there is too little of it."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as e:
        parser.error((str(e).strip().splitlines() or [type(e).__name__])[-1])  # a worker's begins with its traceback
    except (RuntimeError, MemoryError) as e:  # PyTorch has one error of its own for a GPU's memory, and none for others
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        parser.error(f"out of memory: {memory}")
