"""Damaged and hostile files of every kind that a person can hand to these programs, made from whole ones by chance.

    python -m tests.robust.fuzz --cases 10000                         prints what became of them, for each kind
    python -m tests.robust.fuzz --only pictures --case 17             one case again, with its traceback

The promise: a documented error of one line or a result; no traceback, no hang over 10 s, no more than 3 GB, nothing
half-written, no code run. Case i of a kind depends on the seed and i alone. A process of its own reads case after case,
and is watched from outside: what hangs or dies costs that case, and the next process goes on behind it.
"""

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.robust.damage import KINDS, planted

ROOT = Path(__file__).parent.parent.parent
SECONDS, BYTES = 10, 3 * 2**30  # of a case, at most
MAKERS = KINDS | {"planted": planted}
TOLD = ValueError, OSError, FloatingPointError  # what programs report in one line

# --- One process that reads, and the one that watches it ------------------------------------------


def judge(call, folder, said):
    """-> "read", "told" or what was found. `said` is the file to which standard error goes"""
    before = {p: p.stat().st_size for p in folder.rglob("*")}
    said.truncate(0)
    said.seek(0)
    outcome = "read"
    try:
        call()
    except SystemExit as e:
        sys.stderr.flush()
        lines = Path(said.name).read_text(errors="replace").replace("\r", "\n").strip().splitlines() or [""]
        good = e.code == 2 and ".py: error: " in lines[-1] and not any("Traceback" in line for line in lines)
        outcome = "told" if good else f"exit {e.code}: {lines[-1][:200]}"
    except TOLD as e:
        lines = str(e).strip().splitlines()
        outcome = "told" if len(lines) == 1 else f"{len(lines)} lines: {str(e)[:200]}"
    except Exception as e:
        memory = isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and "memory" in str(e))
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.name}:{frame.lineno}"
        outcome = "told" if memory else f"traceback {where}: {type(e).__name__}: {str(e)[:200]}"
    after = {p: p.stat().st_size for p in folder.rglob("*")}
    if (folder / "code ran").exists():
        return "code ran"
    if any(p.name.startswith(".") and p not in before for p in after):
        return f"half-written: {outcome}"
    if outcome != "read" and (folder / "out.png").exists():
        return f"a picture beside an error: {outcome}"
    return outcome


def read_cases(kind, seed, first, last, loud=False):
    """What the reading process does: a line before each case, and one after it, on standard output"""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "said", "w+") as said:
        if not loud:
            os.dup2(said.fileno(), 2)
        folder = Path(scratch) / "whole"
        folder.mkdir()
        whole = None
        if kind in KINDS:
            from tests.robust.whole import Whole  # it imports all there is, for seconds

            whole = Whole(folder)
        for i in range(first, last):
            rng = random.Random(f"{kind} {seed} {i}")
            folder = Path(scratch) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                call = MAKERS[kind](whole, folder, rng)
            except Exception as e:  # a mistake here
                report.write(json.dumps({"begins": i, "held": 0}) + "\n")
                told = {"ends": i, "outcome": f"not made: {type(e).__name__}: {e}", "most": 0}
                report.write(json.dumps(told) + "\n")
                continue
            with contextlib.suppress(OSError):  # from here on the largest size is counted anew
                Path("/proc/self/clear_refs").write_text("5")
            report.write(json.dumps({"begins": i, "held": read_memory(os.getpid())}) + "\n")
            outcome = call() if loud else judge(call, folder, said)
            report.write(json.dumps({"ends": i, "outcome": outcome, "most": read_memory(os.getpid(), "VmHWM")}) + "\n")


def read_memory(process, what="VmRSS"):
    """-> bytes; 0 where the system does not say"""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
    return 0


def watch(kind, seed, cases, seconds=SECONDS):
    """-> {case: outcome} of a kind"""
    outcomes = {}
    first = 0
    while first < cases:
        command = [sys.executable, "-m", "tests.robust.fuzz", "--read", kind, str(seed), str(first), str(cases)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, bufsize=0)
        current, begun, held, verdict = None, None, 0, None
        while verdict is None:
            ready, _, _ = select.select([process.stdout], [], [], 0.2)
            line = process.stdout.readline() if ready else None
            if line == b"":
                verdict = "end" if process.wait() == 0 else f"died with status {process.returncode}"
            elif line:
                told = json.loads(line)
                current = told.get("begins", current)
                begun, held = time.monotonic(), told.get("held", held)
                if "ends" in told:
                    begun = None
                    grown = told["most"] - held > BYTES and held
                    outcomes[current] = "more than 3 GB" if grown else told["outcome"]
            elif begun and time.monotonic() - begun > seconds:
                verdict = f"more than {seconds} s"
            elif begun and held and read_memory(process.pid) - held > BYTES:
                verdict = "more than 3 GB"
        if verdict == "end":
            break
        process.kill()
        process.wait()
        process.stdout.close()
        if current is None:
            raise ChildProcessError(f"{' '.join(command)}: {verdict} before its first case")
        outcomes[current] = verdict
        first = current + 1
    return outcomes


def count(outcomes):
    """-> "3 read, 4 told", [(case, what was found)]"""
    found = [(i, outcome) for i, outcome in sorted(outcomes.items()) if outcome not in ("read", "told")]
    numbers = Counter(outcome if outcome in ("read", "told") else "found" for outcome in outcomes.values())
    return ", ".join(f"{numbers[name]} {name}" for name in ("read", "told", "found")), found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=400, help="of all kinds together")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", choices=KINDS, help="one kind")
    p.add_argument("--case", type=int, help="one case of --only, in this process, with its traceback")
    p.add_argument("--read", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.read:
        kind, *numbers = args.read
        return read_cases(kind, *map(int, numbers))
    if args.case is not None:
        return read_cases(args.only, args.seed, args.case, args.case + 1, loud=True)
    kinds = [args.only] if args.only else list(KINDS)
    total = 0
    for kind in kinds:
        counts, found = count(watch(kind, args.seed, -(-args.cases // len(kinds))))
        print(f"{kind}: {counts}", flush=True)
        for i, outcome in found:
            print(f"    --only {kind} --seed {args.seed} --case {i}: {outcome}")
        total += len(found)
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
