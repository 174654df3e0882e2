"""Time and memory, measured: functions called in turn, processes of their own, figures with their spread.

    figures = compare(o, ours, peer, "diffusers", at_most=1.0)      a row of a table: both times, their ratio
    seconds = alternate({"ours": f, "theirs": g}, o)                 {name: seconds of a call, one per round}
    done = in_own_process("bench.models.load_once", path="sd.ckpt")  what that function returns, as a dict
    with Watch(device) as w: ...                                     then w.seconds, w.total, w.private

`o` is what every topic of -m bench is given: the options of its command line, of which `device` and `rounds` are read
here. A figure is text, a number, or a `summary` of several numbers.
"""

import importlib
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch

LIMIT = 90  # seconds for a row without --rounds: of what is slow there are fewer rounds, and a topic takes minutes
MOST = 5  # rounds without --rounds
SHORTEST = 0.02  # seconds: what is done sooner is repeated until it is longer than clocks and schedulers are coarse


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def summary(values, unit=""):
    """Numbers -> their median, least, largest and count: of three to five, quartiles would tell less than all do.

    unit  "s": shown as ms or µs where that reads better; "ratio"; "%": a share of 1; "": a number
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values),
            "unit": unit}


def rates(count, seconds):
    """How many a second, of `count` in each of `seconds`."""
    return summary([count / s for s in seconds])


def ratio(ours, theirs):
    """Times of both, round by round -> ours / theirs, below 1 where ours is faster. The medians' ratio; the spread is
    that of single rounds, whose two calls were neighbours in time and had the same weather."""
    each = [a / b for a, b in zip(ours, theirs)]
    middle = statistics.median(ours) / statistics.median(theirs)
    return summary(each, "ratio") | {"median": middle, "low": min(*each, middle), "high": max(*each, middle)}


# ---------------------------------------------------------------------------------------------------------------------
# Time


def synchronize(device):
    """A GPU is done with what it was told when this returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(runs, o, warm=None):
    """{name: function} called in turn, and in the reverse order every other round -> {name: [what it returned]}

    As many rounds as o.rounds; without it MOST, or as many as begin within LIMIT seconds, but one at least. Before
    them warm(name) is called for each; None: the function itself.
    """
    begin, results = time.perf_counter(), {name: [] for name in runs}
    for name in runs:
        (warm or (lambda name: runs[name]()))(name)
    for i in range(o.rounds or MOST):
        if i and not o.rounds and time.perf_counter() - begin > LIMIT:
            break
        for name in list(runs)[:: -1 if i % 2 else 1]:
            results[name].append(runs[name]())
    return results


def alternate(runs, o):
    """{name: function} -> {name: [seconds of a call, per round]}, {name: what it returned last}. Without gradients."""
    repeats, last = dict.fromkeys(runs, 1), {}

    def clocked(name):
        synchronize(o.device)
        start = time.perf_counter()
        for _ in range(repeats[name]):
            last[name] = runs[name]()
        synchronize(o.device)
        return (time.perf_counter() - start) / repeats[name]

    def warm(name):
        once = clocked(name)
        if once < 1:  # the first call may have made what is made once
            once = clocked(name)
        repeats[name] = min(1000, math.ceil(SHORTEST / max(once, 1e-9)))

    with torch.inference_mode():
        return turns({name: partial(clocked, name) for name in runs}, o, warm), last


def difference(a, b):
    """The largest difference of two tensors in relation to b's largest number."""
    a, b = a.float(), b.float().to(a.device)
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(o, ours, peer, name, at_most=None, same=True):
    """A pair of functions -> the figures of a row.

    peer     None where it is not installed: then our time stands alone
    name     of the peer
    at_most  what the ratio of times, ours / peer's, should not exceed
    same     both return the same tensor, but for rounding: how far they are apart becomes a figure
    """
    s, last = alternate({"ours": ours} | ({name: peer} if peer else {}), o)
    apart = difference(last["ours"], last[name]) if peer and same else None
    return side_by_side(s["ours"], s.get(name), name, at_most, apart)


def side_by_side(ours, theirs, name, at_most=None, apart=None):
    """Seconds of both, round by round, and the rest of `compare` -> the figures of a row. theirs None: not installed"""
    figures = {"ours": summary(ours, "s"), "peer": name if theirs else f"{name}: not installed"}
    columns = dict.fromkeys(("its time", "ours / peer"))
    if theirs:
        columns = {"its time": summary(theirs, "s"), "ours / peer": ratio(ours, theirs)}
    return figures | columns | {"at most": at_most, "difference": apart}


def installed(make, *args):
    """make(*args), or None where a peer that it imports is not installed."""
    try:
        return make(*args)
    except ImportError:
        return None


HELD = {}


def held(make, *args):
    """make(*args), kept until something else is asked for: neighbouring rows share a model, and there is room for one
    of full size, not for two."""
    if (make, args) not in HELD:
        HELD.clear()
        HELD[make, args] = make(*args)
    return HELD[make, args]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory(key):
    """This process's memory in MiB: VmHWM is the peak of all of it, RssAnon what is private now, not a file's pages."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


class Watch:
    """with Watch() as w: ...   then w.seconds, and w.total and w.private, the peaks in MiB above the start.

    On a GPU w.total is that of its own memory, and there is no w.private. Elsewhere the peaks are the process's, so
    that whoever asks for them needs a process of its own.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            self.start_private, self.start, self.private, self.done = memory("RssAnon"), memory("VmRSS"), 0, False
            self.thread = threading.Thread(target=self.sample)
            self.thread.start()
        synchronize(self.device)
        self.clock = time.perf_counter()
        return self

    def sample(self):
        while not self.done:
            self.private = max(self.private, memory("RssAnon") - self.start_private)
            time.sleep(0.005)

    def __exit__(self, *_):
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.clock
        if self.device.type == "cuda":
            self.total = torch.cuda.max_memory_allocated(self.device) / 2**20 - self.start
        else:
            self.done = True
            self.thread.join()
            self.total = memory("VmHWM") - self.start


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def in_own_process(function, **arguments):
    """'module.function', called with these arguments in a process of its own -> the dict that it returned.

    RuntimeError with the last line of what it said, if it failed.
    """
    child = [sys.executable, "-m", "bench.clock", function, json.dumps(arguments)]
    done = subprocess.run(child, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"in a process of its own: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, function = sys.argv[1].rsplit(".", 1)
    print("\n" + json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))
