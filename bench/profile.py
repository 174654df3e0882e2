"""-m bench's topic of where the time goes: the three slowest paths by kind of work, before and after they were made
quick.

    python -m bench profile                     at Stable Diffusion 1.4's size; --model toy for a look
    seconds = by_kind(profiled(run, device))    {kind of work: seconds} of a function

"Before" is not an old version: it is the plain twin of what is quick, which is still here. Networks are plain until
`winograd.quicken` is called on them, a process gives memory back until `hold_memory` is, and a Magic Fixup without
memory for it runs its extractor step by step. Memory once held cannot be undone, so each side has its own process.
"""

import re
import statistics
from functools import partial
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mfx
import pairs
from bench.clock import alternate, held, in_own_process, ratio, summary, synchronize
from bench.edits import STEPS
from bench.models import CONFIGS, NAMES, SIDES, part, quick, without_text
from common.devices import make_fast
from kernels.winograd import hold_memory
from sample import fixup

# What an operator's name, without `aten::` and underscores around it, has to match. The first kind that fits counts.
KINDS = {
    "convolutions": r".*conv(olution|2d).*",
    "matrix products": r"(b?add)?b?mm|(add)?mv|matmul|(mkl_|mkldnn_)?linear",
    "attention": r".*attention.*|(safe_)?softmax",
    "norms": r"(native_)?(group|layer)_norm.*",
    "activations and sums": r"silu|gelu|sigmoid|r?sub|add|mul|div|neg|exp|pow|r?sqrt|sin|cos|clamp\w*|addc\w+|sum|mean",
    "copies and memory": (
        r"to|(to_)?copy|clone|contiguous|cat|stack|repeat\w*|index\w*|.*pad\w*|upsample_nearest\w*|resize|set|fill"
        r"|(zeros|ones|full|(new_)?empty)\w*|zero|new_\w+|lift_fresh|resolve_\w+|detach|alias|as_strided"
        r"|(unsafe_)?view\w*|reshape\w*|expand\w*|permute|transpose|t|numpy_T|unfold|(un)?flatten|(un)?squeeze|select"
        r"|slice|narrow|chunk|split\w*|unbind"
    ),
}
REST, ALL = "the rest", "all"
WORKS = (*KINDS, REST)
SHORTEST = 0.5  # seconds: what is done sooner is profiled several times

# ---------------------------------------------------------------------------------------------------------------------
# Kinds of work


def kind_of(operator):
    """A name as torch.profiler has it, "aten::mkldnn_convolution" -> a kind of work"""
    name = operator.removeprefix("aten::").strip("_")
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), REST)


def profiled(run, device, calls=1):
    """-> torch.profiler's averages by operator, of that many calls in a row"""
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU, *gpu]) as p:
        for _ in range(calls):
            run()
        synchronize(device)
    return p.key_averages()


def by_kind(operators, gpu=False):
    """-> {kind of work: seconds in its operators themselves, without those that they call}; on a GPU, in their kernels.

    What Python does between operators is in none of them.
    """
    seconds = dict.fromkeys(WORKS, 0.0)
    for e in operators:
        if e.device_type == DeviceType.CPU:  # a GPU's kernels are listed too, once more
            seconds[kind_of(e.key)] += (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# The paths: (toy or full, pixels along a side, steps, device, after or before?) -> a function to be timed


def unet_step(kind, side, steps, device, after):
    network, s = part("unet", kind, torch.float32, device), side // CONFIGS[kind]["vae"].factor
    z, context = torch.randn(1, network.config.in_channels, s, s), torch.randn(1, 77, network.config.context)
    inputs = (x.to(device) for x in (z, torch.tensor([500]), context))
    return partial(quick(network) if after else network, *inputs)


def decoding(kind, side, steps, device, after):
    network = part("vae", kind, torch.float32, device)
    s = side // network.config.factor
    z = torch.randn(1, network.config.latent_channels, s, s).to(device)
    return partial((quick(network, keep=False) if after else network).decode, z)


def whole_fixup(kind, side, steps, device, after):
    model = mfx.from_stable_diffusion(without_text(kind)).requires_grad_(False).eval().to(device)
    if after:
        make_fast(model, device)
    else:
        model.denoiser = partial(model.denoiser, memory=0)  # the extractor runs at every step
    pair = pairs.toy_pairs(1, torch.Generator().manual_seed(0), size=side)
    return partial(fixup, model, pair["reference"], pair["coarse"], pair["mask"], steps=steps)


PATHS = {"a UNet step": unet_step, "decoding": decoding, "a Magic Fixup": whole_fixup}

# ---------------------------------------------------------------------------------------------------------------------
# The topic


def once(path, kind, side, steps, device, rounds, after):
    """-> {"all": seconds of each round by the clock, kind of work: [seconds]}. In a process of its own."""
    if after:
        hold_memory()
    device = torch.device(device)
    torch.manual_seed(0)
    run = PATHS[path](kind, side, steps, device, after)
    seconds = alternate({ALL: run}, SimpleNamespace(rounds=rounds, device=device))[0]  # so it is warm
    calls = max(1, round(SHORTEST / statistics.median(seconds[ALL])))
    works = by_kind(profiled(run, device, calls), device.type == "cuda")
    return seconds | {work: [s / calls] for work, s in works.items()}


def both(path, kind, side, steps, device, rounds):
    arguments = dict(path=path, kind=kind, side=side, steps=steps, device=device, rounds=rounds)
    return [in_own_process("bench.profile.once", after=after, **arguments) for after in (False, True)]


def row(o, work, *what):
    before, after = held(both, *what, str(o.device), o.rounds)

    def share(seconds):
        return None if work == ALL else round(seconds[work][0] / sum(seconds[w][0] for w in WORKS), 3)

    return {"before": summary(before[work], "s"), "share before": share(before),
            "after": summary(after[work], "s"), "share after": share(after),
            "after / before": ratio(after[work], before[work]) if all(before[work]) else None}


def slowest(o):
    """In fp32: before, our networks as they are written, and after, as sample.py runs them. What was changed:

    - a UNet step: 3x3 convolutions are Winograd's, of weights that are transformed once, or, where there are few
      pixels, one matrix product
    - decoding: the same, but the weights are transformed in each call, to save memory
    - a whole Magic Fixup: both; and the extractor, all of which ran at every step, runs for many steps in one batch, up
      to its last feature, and its keys and values are kept until their step
    - all three: the process keeps the memory that it frees; to have it zeroed anew was a part of every kind of work

    Winograd's convolutions are counted as what they are made of: matrix products, copies and sums. The kinds' times are
    those in torch.profiler's operators, with its overhead, averages of calls in a row where one is short; `all` is the
    clock's time, without it."""
    kind = o.model or "full"
    side, steps = o.size or SIDES[kind], o.steps or STEPS[kind]
    rows = {}
    for path in PATHS:
        name = f"{path}{f', {steps} steps' if path == 'a Magic Fixup' else ''}, {NAMES[kind]}, {side}x{side}"
        rows |= {f"{name}: {work}": partial(row, o, work, path, kind, side, steps) for work in (*WORKS, ALL)}
    return rows


TOPICS = {"profile": ("Where the time goes, before and after", slowest)}
