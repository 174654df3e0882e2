"""-m bench's topic of scale: time and memory against size, steps, batch and processes; and what follows for the paper.

`curves` measures points, `draw` makes charts of them, and `arithmetic` says how long the paper's own training would
take, from what was measured elsewhere: -m bench --page calls the latter two with the log's records.
"""

import os
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

import pairs
import train
from bench.clock import LIMIT, Watch, in_own_process, summary, synchronize
from bench.edits import PROMPT, magic_fixup, meadow, ramp
from bench.models import DTYPES, NAMES, SIDES, stable_diffusion
from bench.training import PEAK, peak_flops
from common.devices import choose_precision
from common.files import atomic_write
from reproduce import charts
from sample import edit, fixup

POINTS = {
    "size": {"toy": (128, 192, 256, 384), "full": (256, 512, 768, 1024)},  # pixels along a side of an edited picture
    "steps": {"toy": (5, 10, 20, 40), "full": (5, 10, 20, 40)},  # of an edit
    "batch": {"toy": (1, 2, 4, 8), "full": (1, 2, 4, 8)},  # samples of one Magic Fixup edit
}
STEPS = 5  # of the edits whose size or batch varies
CHART = 420, 280  # pixels
AXES = {"time": "seconds", "peak GiB": "peak GiB", "pairs a second": "pairs a second"}
LABELS = {"size": "pixels along a side", "steps": "steps", "batch": "samples in a batch", "processes": "processes"}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def edit_once(what, value, kind, dtype, device, rounds):
    """One point: an edit after a warm-up, and the peak of memory with the weights. In a process of its own."""
    device, dtype, seconds = torch.device(device), getattr(torch, dtype), []
    at = {"size": SIDES[kind], "steps": STEPS, "batch": 1} | {what: value}
    with Watch(device) as watch, torch.inference_mode():
        if what == "batch":
            model = magic_fixup(kind, dtype, device)
            pair = pairs.toy_pairs(1, torch.Generator().manual_seed(0), size=at["size"])
            pictures = [pair[name] for name in ("reference", "coarse", "mask")]
            run = partial(fixup, model, *pictures, steps=at["steps"], seeds=range(value))
        else:
            model, side = stable_diffusion(kind, dtype, device), at["size"]
            run = partial(edit, model, PROMPT, meadow(side), ramp(side), steps=at["steps"])
        begin = time.perf_counter()
        for i in range(rounds + 1):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i:
                seconds.append(time.perf_counter() - start)
                if time.perf_counter() - begin > LIMIT:
                    break
    return {"seconds": seconds, "MiB": watch.total}


def pairs_a_second(processes, size, count=64):
    """Toy pairs from a data loader with that many workers, of one thread each; without the time of their start."""
    loader = DataLoader(pairs.ToyPairs(count + 4 * processes, size=size), batch_size=1, num_workers=processes,
                        prefetch_factor=2)
    reader = iter(loader)
    for _ in range(2 * processes):
        next(reader)
    start, done = time.perf_counter(), sum(1 for _ in reader)
    return done / (time.perf_counter() - start)


def curves(o):
    """Time and memory of whole edits against the picture's size and the steps (a change map, guided), and against the
    samples of one Magic Fixup edit, each in a process of its own; and training pairs made a second against processes.
    Memory is the peak, weights included, above the bare program's."""
    kind = o.model or ("full" if o.device.type == "cuda" else "toy")
    dtype = DTYPES.get(o.dtype) or choose_precision("auto", o.device)

    def point(what, value):
        done = in_own_process("bench.scale.edit_once", what=what, value=value, kind=kind, dtype=str(dtype)[6:],
                              device=str(o.device), rounds=o.rounds or 3)
        return {"what": what, "at": value, "time": summary(done["seconds"], "s"), "peak GiB": done["MiB"] / 1024}

    def workers(n):
        made = [pairs_a_second(n, SIDES["toy"]) for _ in range(o.rounds or 3)]
        return {"what": "processes", "at": n, "pairs a second": summary(made)}

    cores = os.cpu_count() or 1
    rows = {f"{what} {value}, {NAMES[kind]}, {str(dtype)[6:]}": partial(point, what, value)
            for what in POINTS for value in POINTS[what][kind]}
    return rows | {f"{n} process{'es' * (n > 1)}": partial(workers, n) for n in (1, 2, 4, 8, 16) if n <= max(2, cores)}


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def draw(records, folder):
    """The topic's records of one run -> [(path, width to show it at, caption)], time and memory side by side."""
    made = []
    for what, label in LABELS.items():
        points = sorted((r["figures"] for r in records if r["figures"].get("what") == what), key=lambda f: f["at"])
        if len(points) < 2:
            continue
        x, drawn, told = [f["at"] for f in points], [], []
        for key, y_label in AXES.items():
            if key in points[0]:
                y = [f[key]["median"] if isinstance(f[key], dict) else f[key] for f in points]
                line = ("", x, y, {"dots": True, "line": True})
                drawn.append(charts.chart([line], label, y_label, CHART, y_range=(0, 1.15 * max(y))))
                told.append(y_label)
        sheet = Image.new("RGB", (sum(c.width for c in drawn), drawn[0].height), "white")
        for i, one in enumerate(drawn):
            sheet.paste(one, (i * one.width, 0))
        path = Path(folder) / f"{what}-{records[0]['device']}.png"
        with atomic_write(path) as tmp:
            sheet.save(tmp, "PNG")
        made.append((path, sheet.width // charts.SCALE, f"{' and '.join(told)} against {label}"))
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What follows for the paper

CLIPS = 2_500_000  # the paper's videos


def training_hours(samples_a_second, gpus=1):
    """The paper's run, 120,000 steps of 32 samples, were `gpus` of them as many times as fast as one."""
    recipe = train.RECIPES["paper"]
    return recipe.steps * recipe.batch / (samples_a_second * gpus) / 3600


def on_an_a100(samples_a_second, gpu):
    """Samples a second on another GPU -> on an A100, at the same share of its peak in bf16; None for an unknown GPU."""
    return samples_a_second * PEAK["A100"] / peak_flops(gpu) if peak_flops(gpu) else None


def cutting_hours(clips_a_second, processes):
    """All of the paper's videos, by processes of which each is as fast as the one that was measured."""
    return CLIPS / (clips_a_second * processes) / 3600


def arithmetic(newest):
    """{(topic, device): records} -> sentences"""
    told, on_gpu = [], newest.get(("train", "cuda"), ())
    rates = [(r["figures"]["samples a second"]["median"], r["machine"]["gpu"]) for r in on_gpu
             if r["row"].startswith(NAMES["full"]) and "failed" not in r["figures"]]
    if not rates:
        told.append("How long the paper's training run (120,000 steps of 32 samples; 48 hours on 8 A100s) would take "
                    "with this code is open: no GPU was at hand, and a CPU's step says nothing about one.")
    else:
        rate, gpu = max(rates)
        samples = training_hours(1) * 3600 / 1e6
        told.append(f"The paper's training run is {samples:.2f} million samples. At the {rate:.1f} a second of one "
                    f"{gpu}, as measured, that is {training_hours(rate):.0f} hours; by eight, were they eight times as "
                    f"fast, {training_hours(rate, 8):.0f}.")
        if "A100" not in gpu and (slower := on_an_a100(rate, gpu)):
            told.append(f"An A100 was not measured. At the same share of its peak in bf16 it would make {slower:.1f} "
                        f"samples a second: {training_hours(slower):.0f} hours alone, {training_hours(slower, 8):.0f} "
                        "by eight. The paper's eight took 48.")
    for r in newest.get(("pairs", "cpu"), ()):
        if cut := r["figures"].get("clips cut a second"):
            told.append(f"The paper's 2.5 million clips, at the {cut['median']:.2f} a second that one process cuts of "
                        "short ones, by classical estimators, are "
                        f"{cutting_hours(cut['median'], 1) / 24:.0f} days of one process, "
                        f"{cutting_hours(cut['median'], 1000):.1f} hours of a thousand.")
    return told


TOPICS = {"scale": ("Scale", curves)}
