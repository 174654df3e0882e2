"""What Differential Diffusion costs: Table 4 with Figure 23, time; section 5.4, memory."""

import time

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import diffdiff
import diffusion
from reproduce import charts
from reproduce.dd_tables import pattern
from reproduce.lab import Outcome, item, judge

# ---------------------------------------------------------------------------------------------------------------------
# Table 4, Figure 23

MINIMA = [i / 10 for i in range(10)]
PAPER_SAVED = (0, 10.74, 20.55, 29.90, 39.87, 49.70, 59.51, 69.37, 79.17, 88.99)  # percent, against no skipping


def figure23_verdict(results, timings):
    return judge(
        (timings["R2"] >= 0.99, f"R² of the line is {timings['R2']:.4f}"),
        (timings["saved at 0.9"] >= 0.85, f"at a minimum of 0.9 skipping saves {100 * timings['saved at 0.9']:.1f} %"),
    )


@item(
    "figure23", "Table 4, Figure 23", cost=130,
    claim="Skipping makes the running time fall in a line with the map's minimum. At a minimum of 0.9 it saves 89 %.",
    done="Gradient maps from each minimum up to 1, {pictures} pictures at a time, {steps} steps, guidance 7.5: seconds "
         "of the diffusion loop (the autoencoder's time is the same in all), medians of {rounds} rounds that go "
         "through all maps in turn. One in the list is without skipping.",
    table=lambda r, t: [["map's minimum", "steps run", "time", "saved: paper", "saved: here"],
                        ["no skipping", str(r["steps"]), f"{t['no skipping']:.2f} s", "", ""], *[
        [f"{m:.1f}", str(c), f"{s:.2f} s", f"{p:.1f} %", f"{100 * (1 - s / t['no skipping']):.1f} %"]
        for m, c, s, p in zip(MINIMA, r["steps run"], t["seconds by minimum"], PAPER_SAVED)]],
    verdict=figure23_verdict,
)
def figure23(lab):
    size, steps, rounds = lab.model.size, lab.steps(50), lab.count(5, 3)
    image = lab.images(4 if lab.quick or lab.full_size else 8)
    sampler = diffusion.make_sampler("ddim", lab.model.schedule, steps)
    z_init = lab.model.encode_image(image.to(lab.device))
    noise = torch.randn(z_init.shape, generator=torch.Generator().manual_seed(0)).to(lab.device)
    denoise = lab.model.denoiser([lab.options.prompt] * len(image), guidance=7.5)
    calls, seconds = [], {m: [] for m in [None, *MINIMA]}

    def timed(minimum):
        counted = []
        mu = torch.linspace(minimum or 0, 1, size).expand(size, size)
        # The mean over a latent pixel is above the map's least value: give that a whole column of latents.
        mu = torch.cat([torch.full((size, size // 16), minimum or 0.0), mu[:, size // 16 :]], 1)

        def watched(z, t):
            counted.append(1)
            return denoise(z, t)

        start = time.perf_counter()
        z = diffdiff.differential_diffusion(watched, z_init, mu, sampler, noise, skip=minimum is not None)
        if z.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, len(counted)

    timed(0.9)  # warm
    for i in lab.each(range(rounds)):
        for minimum in seconds:
            spent, count = timed(minimum)
            seconds[minimum].append(spent)
            if i == 0 and minimum is not None:
                calls.append(count)
    median = [float(np.median(seconds[m])) for m in MINIMA]
    without = float(np.median(seconds[None]))
    slope, start = np.polyfit(1 - np.array(MINIMA), median, 1)
    fit = start + slope * (1 - np.array(MINIMA))
    R2 = 1 - np.square(median - fit).sum() / np.square(median - np.mean(median)).sum()
    lab.save(charts.chart([
        ("measured", MINIMA, median, {"dots": True}),
        (f"line, R2 = {R2:.4f}", MINIMA, fit, {}),
        ("no skipping", [0, 0.9], [without, without], {}),
    ], "minimum of the change map", "seconds", y_range=(0, 1.1 * max(without, *median))), "figure23-chart.png")
    return Outcome(
        {"pictures": len(image), "steps": steps, "rounds": rounds, "steps run": calls},
        [("figure23-chart.png", "Figure 23: running time of the diffusion loop against the map's minimum.")],
        {"no skipping": round(without, 3), "seconds by minimum": [round(s, 3) for s in median],
         "R2": round(float(R2), 5), "saved at 0.9": round(1 - median[-1] / without, 4)},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Section 5.4: memory


class Live(TorchDispatchMode):
    """with Live() as live: ... -> live.peak, the most bytes at one time in tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.peak, self.alive = 0, {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}  # of which there are views
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = StorageWeakRef(tensor.untyped_storage())
                self.alive[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        self.alive = {key: (s, n) for key, (s, n) in self.alive.items() if not s.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def peak_memory(f):
    with Live() as live:
        f()
    return live.peak


IMG2IMG = 3e6 / 0.0007  # bytes: the paper's 3 MB are 0.07 % of it


@item(
    "memory", "Section 5.4", cost=2,
    claim="A change map adds less than 3 MB to what image to image takes, 0.07 %.",
    done="The most bytes that are in PyTorch's tensors at one time, in Algorithm 1 with a gradient less the same in "
         "SDEdit. Once with the loaded model and {steps} steps; once with Stable Diffusion 2.1's sizes, a 512x512 map, "
         "64x64 latents in fp32 and 100 steps, without the network, which is the same in both.",
    table=lambda r, t: [["", "paper", "here"],
                        ["added, Stable Diffusion's sizes", "under 3 MB",
                         f"{r['added, Stable Diffusion'] / 1e6:.2f} MB"],
                        ["of the paper's image to image", "0.07 %",
                         f"{100 * r['added, Stable Diffusion'] / IMG2IMG:.3f} %"],
                        ["added, the loaded model", "", f"{r['added'] / 1e6:.3f} MB"],
                        ["image to image, the loaded model, over its weights", "",
                         f"{r['image to image'] / 1e6:.1f} MB"]],
    verdict=lambda r, t: judge((
        r["added, Stable Diffusion"] < 3e6,
        f"{r['added, Stable Diffusion'] / 1e6:.2f} MB at Stable Diffusion's sizes, most of it the map itself and its "
        "masks; each noised original is made when it is needed (all of them ahead, as section 6 proposes, would be 6.5 "
        "MB)",
    )),
)
def memory(lab):
    steps = lab.steps(10)

    def added(denoise, z_init, sampler, mu):
        noise = torch.zeros_like(z_init)
        plain = peak_memory(lambda: diffdiff.sdedit(denoise, z_init, 1.0, sampler, noise))
        ours = peak_memory(lambda: diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise))
        return ours - plain, plain

    z_init = lab.model.encode_image(lab.images(1).to(lab.device))
    denoise = lab.model.denoiser([lab.options.prompt], guidance=7.5)
    denoise(z_init, torch.full((1,), 500, device=lab.device))  # what is made once
    sampler = diffusion.make_sampler("ddim", lab.model.schedule, steps)
    own, plain = added(denoise, z_init, sampler, pattern("gradient", lab.model.size))
    sd = diffusion.make_sampler("ddim", diffusion.Schedule(), 100)
    full, _ = added(lambda z, t: torch.zeros_like(z), torch.zeros(1, 4, 64, 64, device=lab.device), sd,
                    pattern("gradient", 512))
    return Outcome({"steps": steps, "added, Stable Diffusion": full, "added": own, "image to image": plain})
