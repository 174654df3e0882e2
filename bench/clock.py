"""Time, measured: functions called in turn, processes of their own, rows of a table.

    row = compare(o, "the UNet", ours, peer, "diffusers")           times of both, and how far their results differ
    seconds, last = time_in_turn({"ours": f, "peer": g}, o)         {name: [seconds of a call, one per round]}
    made = run_in_own_process("bench.edits.edit_once", who=...)     what that function returns, as a dict

`o` holds the options of the command line. Here its `device` and `rounds` are read.
"""

import importlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

MOST = 5  # rounds without --rounds
LIMIT = 90  # seconds without --rounds: no further round begins after them, so what is slow has fewer

# ---------------------------------------------------------------------------------------------------------------------
# Rows of a table


@dataclass
class Row:
    """One line of a table: the seconds, once per round, of ours and of a peer."""

    what: str
    ours: list
    theirs: list | None = None  # None: no peer, or one that is not installed
    peer: str = ""
    difference: float | None = None  # of the two results; None: they are not comparable


def compute_ratio(ours, theirs):
    """-> ours / theirs, below 1 where ours is less, and the least and largest ratio of a single round

    The ratio is that of the medians. The two calls of a round are neighbours in time, so its own ratio says how much
    the machine's other work disturbed it.
    """
    middle = statistics.median(ours) / statistics.median(theirs)
    each = [a / b for a, b in zip(ours, theirs)]
    return middle, min(*each, middle), max(*each, middle)


HEADER = ("", "ours", "peer's", "ratio", "spread", "difference", "peer")


def format_row(row):
    """Row -> its cells as text, in the order of HEADER. The spread is the ratio's; without a peer, that of ours."""
    ours = f"{statistics.median(row.ours):.3g} s"
    if not row.theirs:
        spread = f"{min(row.ours):.3g} .. {max(row.ours):.3g}"
        return row.what, ours, "", "", spread, "", row.peer and f"{row.peer} is not installed"
    theirs = f"{statistics.median(row.theirs):.3g} s"
    ratio, low, high = compute_ratio(row.ours, row.theirs)
    difference = "" if row.difference is None else f"{row.difference:.0e}"
    return row.what, ours, theirs, f"{ratio:.2f}", f"{low:.2f} .. {high:.2f}", difference, row.peer


# ---------------------------------------------------------------------------------------------------------------------
# Time


def synchronize(device):
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_in_turn(runs, o, warm=1):
    """{name: function} called in turn, in reverse order every other round -> {name: [what it returned]}

    There are o.rounds rounds, or without that number MOST, of which none but the first begins after LIMIT seconds.
    Before them each function is called `warm` times.
    """
    begin = time.perf_counter()
    for run in runs.values():
        for _ in range(warm):
            run()
    results = {name: [] for name in runs}
    for i in range(o.rounds or MOST):
        if i and not o.rounds and time.perf_counter() - begin > LIMIT:
            break
        for name in list(runs)[:: -1 if i % 2 else 1]:
            results[name].append(runs[name]())
    return results


def time_in_turn(runs, o):
    """{name: function} -> {name: [seconds of a call, per round]}, {name: what it returned last}; without gradients"""
    last = {}

    def measure(name):
        synchronize(o.device)
        start = time.perf_counter()
        last[name] = runs[name]()
        synchronize(o.device)
        return time.perf_counter() - start

    with torch.inference_mode():
        return call_in_turn({name: partial(measure, name) for name in runs}, o), last


def compute_difference(a, b):
    """The largest difference of two tensors, relative to b's largest number."""
    a = a.float()
    b = b.float().to(a.device)
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(o, what, ours, peer, name):
    """Two functions that return the same tensor, but for rounding -> Row.

    peer  None where it is not installed: then our time stands alone
    name  the peer's
    """
    seconds, last = time_in_turn({"ours": ours} | ({"peer": peer} if peer else {}), o)
    difference = compute_difference(last["ours"], last["peer"]) if peer else None
    return Row(what, seconds["ours"], seconds.get("peer"), name, difference=difference)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def run_in_own_process(function, **arguments):
    """'module.function', called with these arguments in a process of its own -> the dict that it returns.

    RuntimeError with the last line that it prints, if it fails.
    """
    child = [sys.executable, "-m", "bench.clock", function, json.dumps(arguments)]
    done = subprocess.run(child, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{function} in a process of its own: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, function = sys.argv[1].rsplit(".", 1)
    print("\n" + json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))
