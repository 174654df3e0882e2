"""What -m bench measured, kept and told: the log, tables in Markdown, and BENCHMARKS.md.

The log is a file of JSON lines, one for every row of every run:

    {"topic": "unet", "device": "cpu", "row": "Stable Diffusion 1.4, fp32, batch 1", "figures": {...}, "run": "...",
     "command": "...", "machine": {...}, "versions": {...}}

where `run` is the time at which the run began. A row that failed has figures {"failed": why}.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from common.files import atomic_write

BUSY = 0.2  # cores at work for others: from here on it is said
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torchvision", "segment-anything", "lpips")


# ---------------------------------------------------------------------------------------------------------------------
# Where it was measured


def machine(device):
    """The processor and its cores, the threads that PyTorch uses, the GPU."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "threads": torch.get_num_threads(),
            "tiles": torch.cpu._is_amx_tile_supported(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}


def others(seconds=0.5):
    """How many cores other programs keep busy while this one sleeps. Where it is not about 0, no time holds."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0

    def busy():
        user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")

    begin, start = busy(), time.perf_counter()
    time.sleep(seconds)
    return round((busy() - begin) / (time.perf_counter() - start), 1)


def versions():
    """Of Python, PyTorch and the peers that are installed, and of this code."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        found["ours"] = done.stdout.strip() or "unknown"
    except OSError:
        found["ours"] = "unknown"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The log


def append(path, record):
    """One more line. It is written at once, and after an unfinished one, of a run that was killed, begins anew."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read(path):
    """-> the records of a log, from old to new. FileNotFoundError if there is none, ValueError names a damaged line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no log {path}: measure first, python -m bench TOPIC, or --log FILE")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            record["topic"], record["device"], record["row"], record["run"], record["figures"].items()
            record["command"], record["machine"]["cpu"], record["versions"]["torch"]
            records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}, is no record of -m bench: delete that line") from None
    return records


def newest(records):
    """-> {(topic, device): its records of the last run that measured it}"""
    last = {}
    for r in records:
        key = r["topic"], r["device"]
        if key not in last or r["run"] > last[key][0]["run"]:
            last[key] = []
        if not last[key] or r["run"] == last[key][0]["run"]:
            last[key].append(r)
    return last


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def short(x):
    """A number with three digits that count."""
    if x == 0 or 0.001 <= abs(x) < 999.5:
        return f"{x:.3g}"
    return f"{x:,.0f}" if abs(x) > 1 else f"{x:.0e}"


def cell(figure):
    """A figure -> text. A summary as its median and, where there was more than one round, its least and largest."""
    if figure is None:
        return ""
    if isinstance(figure, float | int):
        return short(figure)
    if not isinstance(figure, dict):
        return str(figure)
    numbers, unit = [figure[key] for key in ("median", "low", "high")], figure["unit"]
    if unit == "s":
        scale, unit = next(s for s in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if numbers[0] * s[0] >= 0.1 or s[1] == "µs")
        numbers = [x * scale for x in numbers]
    elif unit == "%":
        numbers = [100 * x for x in numbers]
    told = [f"{x:.2f}" for x in numbers] if unit == "ratio" else [short(x) for x in numbers]
    median = f"{told[0]} {unit}" if unit not in ("", "ratio") else told[0]
    if figure["n"] > 1:
        return f"{median} ({told[1]} .. {told[2]})"
    return median if unit == "ratio" else f"{median} (once)"


def table(records):
    """Records of one topic -> Markdown: rows with the same figures share a table, in the order of the first of each;
    below them, what failed. A column without anything in it is left out."""
    kinds, failed = {}, []
    for r in records:
        if "failed" in r["figures"]:
            failed.append(f"- {r['row']}: not measured, {r['figures']['failed']}")
        else:
            kinds.setdefault(tuple(r["figures"]), []).append(r)
    blocks = []
    for columns, some in kinds.items():
        columns = [c for c in columns if any(r["figures"][c] is not None for r in some)]
        rows = [["", *columns], *([r["row"], *(cell(r["figures"][c]) for c in columns)] for r in some)]
        widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
        rows.insert(1, ["-" * w for w in widths])
        blocks.append("\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows))
    return "\n\n".join([*blocks, *(["\n".join(failed)] if failed else [])])


# ---------------------------------------------------------------------------------------------------------------------
# The page

INTRODUCTION = """# Benchmarks

Ours beside what one would use instead: the same weights, the same inputs, in one run, called in turn. Written by
`python -m bench --page --log benchmarks/bench.jsonl`, from the log of what was measured; nothing was put in by hand.

A figure is the median of the rounds, with the least and the largest in brackets, after a call of each to warm up;
"once" is what was measured once. `ours / peer` is the ratio of times, below 1 where ours is faster; its brackets are
the ratios of single rounds. `at most` is what this project has set itself. `difference` is how far the two results are
apart at worst, in relation to the largest number in them: rounding, which is coarse in bf16.
"""


def how(r):
    """A record -> its command, date and state of this code."""
    return f"`{r['command']}`, {r['run'][:10]}, code at {r['versions'].get('ours', 'unknown')}"


def where(r):
    """A record -> its machine and versions."""
    m, v = r["machine"], r["versions"]
    gpu = f"{m['gpu']}; " if m.get("gpu") else ""
    tiles = ", AMX tiles" if m.get("tiles") else ""
    of = ", ".join(f"{name} {version}" for name, version in v.items() if name != "ours")
    busy = f", {m['others']:g} of them busy with other work" if m.get("others", 0) >= BUSY else ""
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    return f"{gpu}{m['cpu']}, {m['cores']} cores{busy}, {threads}{tiles}; {of}"


def page(records, topics, folder):
    """Records, {topic: (title, what it measures)}, the folder that the page will be in -> the page as text.

    Charts are drawn into its folder benchmarks/; what lies there as profiles.md is appended.
    """
    from bench import scale as bench_scale

    last, parts = newest(records), [INTRODUCTION]
    for device, heading in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        measured = [topic for topic in topics if (topic, device) in last]
        machines = {where(last[topic, device][0]) for topic in measured}
        parts.append(f"## {heading}")
        if len(machines) == 1:
            parts.append(f"{machines.pop()}.")
        elif not machines:
            parts.append("Not measured: no GPU was at hand." if device == "cuda" else "Not measured.")
        for topic in measured:
            some, (title, about) = last[topic, device], topics[topic]
            told = f"{how(some[0])}; {where(some[0])}." if machines else f"{how(some[0])}."
            parts += [f"### {title}", about, table(some), told]
            if topic == "scale":
                pictures = bench_scale.draw(some, Path(folder) / "benchmarks")
                parts += [f'<img src="benchmarks/{path.name}" width="{width}" alt="{caption}">'
                          for path, width, caption in pictures]
    parts += ["## The paper's training, and its data", *bench_scale.arithmetic(last)]
    profiles = Path(folder) / "benchmarks" / "profiles.md"
    if profiles.is_file():
        parts.append(profiles.read_text(encoding="utf-8"))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write(path, records, topics):
    path = Path(path)
    text = page(records, topics, path.parent)
    with atomic_write(path) as out:
        out.write_text(text, encoding="utf-8")
