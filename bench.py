"""Speed and memory side by side with peers. One topic each, one table each.

    python bench.py load [--fp32]      loading a checkpoint of Stable Diffusion 1.4's size, in every layout
    python bench.py unet               one 512x512 step of its UNet, in single and half precision
    python bench.py toyworld           pictures of the toy world per second

The weights are random, so nothing is downloaded. Every figure is taken in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parent
TOPICS = {}


def topic(f):
    TOPICS[f.__name__] = f
    return f


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def memory(key):
    """This process's memory in MiB: VmHWM is the peak of all of it, RssAnon what is private now, not a file's pages."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


class Watch:
    """with Watch() as w: ...   then w.seconds, and w.total and w.private, the peaks in MiB above the start."""

    def __enter__(self):
        self.start_private, self.start, self.private, self.done = memory("RssAnon"), memory("VmRSS"), 0, False
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        self.clock = time.perf_counter()
        return self

    def sample(self):
        while not self.done:
            self.private = max(self.private, memory("RssAnon") - self.start_private)
            time.sleep(0.005)

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.clock
        self.done = True
        self.thread.join()
        self.total = memory("VmHWM") - self.start


def table(header, rows):
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in (header, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths)) + " |")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def make_checkpoints(folder, dtype):
    """A random Stable Diffusion 1.4 in three layouts -> {layout: path}"""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_sd import CAPTIONS, to_original  # the original layout, written independently of sd.py

    import clip
    import diffusion
    import sd
    import unet
    import vae

    torch.manual_seed(0)

    def random_model(network, config):
        with torch.device("meta"):
            model = network(config)
        model = model.to(dtype).to_empty(device="cpu")
        for p in model.parameters():
            p.data.uniform_(-0.02, 0.02)
        return model

    model = sd.StableDiffusion(
        random_model(unet.UNet, unet.CONFIGS["sd1"]), random_model(vae.VAE, vae.CONFIGS["sd"]),
        random_model(clip.TextEncoder, clip.CONFIGS["clip-vit-l"]), diffusion.Schedule(),
        clip.Tokenizer(*clip.learn_bpe(CAPTIONS, 600)), size=512,
    )
    paths = {"folder": folder / "folder", ".safetensors": folder / "sd.safetensors", ".ckpt": folder / "sd.ckpt"}
    sd.save(model, paths["folder"])
    tensors = to_original(model)
    sd.save_file(tensors, paths[".safetensors"])
    torch.save({"state_dict": tensors}, paths[".ckpt"])
    model.tokenizer.save(folder / "tokenizer")
    return paths


def load_once(who, path, dtype, configs):
    """Load, then one step of the UNet at 512x512, both measured. In a process of its own; prints a line of JSON."""
    if who == "ours":
        import sd

        with Watch() as loading:
            network = sd.load(path).unet
    else:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        options = {"torch_dtype": getattr(torch, dtype), "safety_checker": None, "local_files_only": True}
        read = diffusers.StableDiffusionPipeline.from_pretrained
        if Path(path).is_file():
            read, options["config"] = diffusers.StableDiffusionPipeline.from_single_file, configs
        with Watch() as loading:
            network = read(path, **options).unet
    torch.manual_seed(0)
    with torch.no_grad(), Watch() as step:  # includes reading the file's pages, where loading only mapped them
        network.float()  # half precision is slow on many CPUs
        out = network(torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randn(1, 77, 768))
    out = out if torch.is_tensor(out) else out.sample
    print(json.dumps({"loading": loading.seconds, "private": loading.private, "step": step.seconds,
                      "total": step.total + step.start - loading.start, "norm": out.norm().item()}))


@topic
def load(args):
    dtype = "float32" if args.fp32 else "float16"
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        paths = make_checkpoints(Path(folder), getattr(torch, dtype))
        gigabytes = paths[".safetensors"].stat().st_size / 1e9
        print(f"Stable Diffusion 1.4, random, {dtype}, {gigabytes:.2f} GB; {torch.get_num_threads()} threads\n")
        rows = []
        for layout, path in paths.items():
            for who in ("ours", "diffusers"):
                child = [sys.executable, __file__, "--once", who, str(path), dtype, str(paths["folder"])]
                result = subprocess.run(child, capture_output=True, text=True)
                if result.returncode:
                    rows.append([layout, who, "failed: " + result.stderr.strip().splitlines()[-1][:90], *[""] * 5])
                    continue
                r = json.loads(result.stdout.splitlines()[-1])
                rows.append([layout, who, f"{r['loading']:.2f}", f"{r['private']:.0f}", f"{r['step']:.1f}",
                             f"{r['loading'] + r['step']:.1f}", f"{r['total']:.0f}", f"{r['norm']:.4f}"])
        table(["layout", "who", "load s", "private MiB", "first step s", "both s", "peak MiB of both", "norm"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Computing


def alternate(runs, rounds):
    """Call the functions in turn, after a warm-up -> {name: median seconds}"""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, f in runs.items():
            start = time.perf_counter()
            f()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


@topic
def unet(args):
    import diffusers

    import unet

    ours = unet.UNet(unet.CONFIGS["sd1"]).eval().requires_grad_(False)
    peer = diffusers.UNet2DConditionModel.from_config(unet.config_to_json(ours.config)).eval().requires_grad_(False)
    peer.load_state_dict(ours.state_dict())
    z, t, context = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randn(1, 77, 768)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = z.to(dtype), t, context.to(dtype)
        with torch.inference_mode():
            runs = {"ours": partial(ours.to(dtype), *inputs), "diffusers": partial(peer.to(dtype), *inputs)}
            s = alternate(runs, args.rounds)
        rows.append([str(dtype)[6:], f"{s['ours']:.2f}", f"{s['diffusers']:.2f}", f"{s['ours'] / s['diffusers']:.2f}"])
    print(f"UNet of Stable Diffusion 1.4, batch 1, 64x64 latents; {torch.get_num_threads()} threads\n")
    table(["precision", "ours s", "diffusers s", "ratio"], rows)


@topic
def toyworld(args):
    import toyworld

    scenes = toyworld.random_scenes(64, torch.Generator().manual_seed(0))
    s = alternate({"render": lambda: toyworld.render(scenes)}, args.rounds)
    print(f"{64 / s['render']:.0f} pictures of 128x128 a second; {torch.get_num_threads()} threads")


# ---------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        load_once(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("--rounds", type=int, default=5, help="unet, toyworld: timed runs, of which the median counts")
    parser.add_argument("--fp32", action="store_true", help="load: a checkpoint of 4 GB instead of 2")
    parser.add_argument("--tmp", help="folder for the checkpoints, 3 times that size")
    args = parser.parse_args()
    TOPICS[args.topic](args)
