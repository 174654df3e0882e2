"""Speed and memory side by side with peers. One topic each, one table each.

    python bench.py load [--fp32]      loading a checkpoint of Stable Diffusion 1.4's size, in every layout
    python bench.py unet               one 512x512 step of its UNet, in single and half precision
    python bench.py toyworld           pictures of the toy world per second
    python bench.py splat              softmax splatting, beside the usual index_add_
    python bench.py pairs              training pairs made and read per second
    python bench.py networks           RAFT, Segment Anything, DPT-Large, LPIPS: at full size, and beside their peers

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
sys.path.append(str(ROOT / "tests"))  # what the tests know about peers serves here as well
import conftest  # noqa: E402, F401, makes torchvision importable, and so transformers and diffusers


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


def index_add_soft(x, flow, metric):
    """Softmax splatting as it is usually written on index_add_: four passes, and a metric small enough for exp."""
    B, C, H, W = x.shape
    w = metric.exp()
    x = torch.cat([x * w, w], 1).permute(0, 2, 3, 1).reshape(-1, C + 1)
    X = torch.arange(W) + flow[:, 0]
    Y = torch.arange(H)[:, None] + flow[:, 1]
    out, batch = torch.zeros(B * H * W, C + 1), torch.arange(B)[:, None, None] * H * W
    for dx in (0, 1):
        for dy in (0, 1):
            x0, y0 = X.floor() + dx, Y.floor() + dy
            inside = ((x0 >= 0) & (x0 < W) & (y0 >= 0) & (y0 < H)).flatten()
            b = ((1 - (X - x0).abs()) * (1 - (Y - y0).abs())).reshape(-1, 1)
            target = (batch + y0 * W + x0).flatten().long()
            out.index_add_(0, target[inside], (x * b)[inside])
    out = out.view(B, H, W, C + 1).permute(0, 3, 1, 2)
    return out[:, :C] / out[:, C:].clamp(min=1e-7)


@topic
def splat(args):
    """Ours subtracts each target's largest metric in a first pass, which the peer does not: it overflows at 89."""
    from splat import softsplat, softsplat_plain

    g, rows = torch.Generator().manual_seed(0), []
    for B, C, H, W in ((1, 3, 512, 512), (1, 6, 1080, 1920)):
        x, metric = torch.rand(B, C, H, W, generator=g), -torch.rand(B, 1, H, W, generator=g)
        flow = 20 * torch.nn.functional.interpolate(torch.randn(B, 2, 8, 8, generator=g), (H, W), mode="bicubic")
        error = (softsplat(x, flow, metric) - index_add_soft(x, flow, metric)).abs().max()
        runs = {"ours": softsplat, "plain": partial(softsplat_plain, mode="soft"), "index_add_": index_add_soft}
        s = alternate({name: partial(f, x, flow, metric) for name, f in runs.items()}, args.rounds)
        rows.append([f"{W}x{H}x{C}", *(f"{1e3 * s[n]:.1f}" for n in s), f"{s['ours'] / s['plain']:.2f}",
                     f"{s['ours'] / s['index_add_']:.2f}", f"{error:.0e}"])
    print(f"softmax splatting, forward, soft mode; {torch.get_num_threads()} threads\n")
    table(["size", "ours ms", "our plain ms", "index_add_ ms", "ours / plain", "ours / index_add_", "difference"], rows)


@topic
def pairs(args):
    """Pairs made on the fly from the toy world; and written to shards and read back, of real size."""
    import torch.utils.data

    import data
    import pairs
    import toyworld
    from pictures import tensor_to_picture

    torch.set_num_threads(1)  # as a data loader's worker has
    s = alternate({"toy": lambda: pairs.toy_pairs(32, torch.Generator().manual_seed(0))}, args.rounds)
    print(f"toy pairs of 128x128, made as they are needed: {32 / s['toy']:.0f} a second")
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        a, b = pairs.toy_motion(8, torch.Generator().manual_seed(1))
        velocity, camera = torch.stack([b.x - a.x, b.z - a.z], -1), b.camera - a.camera
        for i in range(8):  # eight clips of two seconds, as frames
            (Path(folder) / f"clip{i}").mkdir()
        for k in range(13):
            frames = toyworld.render(toyworld.moved(a, velocity, camera, k / 12), 512)
            for i, image in enumerate(frames.image):
                tensor_to_picture(image).save(Path(folder) / f"clip{i}" / f"{k:03d}.png")
        data.main([folder, "--out", f"{folder}/pairs", "--fps", "6", "--pairs", "4"])
        reader = iter(torch.utils.data.DataLoader(pairs.ShardPairs(f"{folder}/pairs", batch=4), batch_size=4))
        s = alternate({"read": lambda: [next(reader) for _ in range(8)]}, args.rounds)
    print(f"pairs of 512x512 read from shards: {32 / s['read']:.0f} a second, by one process")


# ---------------------------------------------------------------------------------------------------------------------
# The networks that the papers lean on


def network_once(kind, path, dtype):
    """Load a published file, then one picture of 1280x720 (RAFT: a pair of them). Prints a line of JSON."""
    import midas
    import networks
    import raft

    first, second = torch.randint(0, 256, (2, 720, 1280, 3), dtype=torch.uint8).numpy()
    with Watch() as loading:
        model = networks.load(kind, path, getattr(torch, dtype))
    run = {"raft": lambda: raft.clip_flows(model, [first, second]), "sam": lambda: model.encode(first),
           "midas": lambda: midas.depth(model, first)}[kind]
    with torch.inference_mode(), Watch() as running:
        run()
        start = time.perf_counter()  # the second time the weights have been read from the disk
        run()
        seconds = time.perf_counter() - start
    total = running.total + running.start - loading.start
    print(json.dumps({"loading": loading.seconds, "seconds": seconds, "total": total}))


def full_size(folder):
    import midas
    import raft
    import sam

    sizes = {"raft": ("RAFT-Large", raft.RAFT), "sam": ("SAM ViT-H", lambda: sam.SAM(sam.CONFIGS["vit_h"])),
             "midas": ("DPT-Large", lambda: midas.DPT(midas.DPTConfig()))}
    rows = []
    for kind, (name, build) in sizes.items():
        path = folder / f"{kind}.pth"
        torch.save(build().state_dict(), path)
        for dtype in ("float32", "bfloat16"):
            child = [sys.executable, __file__, "--network", kind, str(path), dtype]
            result = subprocess.run(child, capture_output=True, text=True, check=True)
            r = json.loads(result.stdout.splitlines()[-1])
            rows.append([name, f"{path.stat().st_size / 1e9:.2f}", dtype, f"{r['loading']:.2f}",
                         f"{r['total'] / 1024:.1f}", f"{r['seconds']:.2f}"])
        path.unlink()
    table(["network", "file GB", "precision", "load s", "peak GiB", "s per picture"], rows)


def network_peers(folder):
    """-> {what: {"ours": function, the peer's name: function}}, on the same random weights"""
    import test_lpips
    import test_midas
    import test_sam
    from torchvision.models.optical_flow import raft_large

    import automask
    import networks
    import sam

    flow = raft_large(weights=None).eval().requires_grad_(False)
    torch.save(flow.state_dict(), folder / "raft.pth")
    our_flow, (first, second) = networks.load("raft", folder / "raft.pth"), torch.rand(2, 1, 3, 520, 960) * 2 - 1
    yield "RAFT-Large, 960x520, 12 updates", {"ours": lambda: our_flow(first, second), "torchvision":
                                              lambda: flow(first, second, num_flow_updates=12)}
    authors = test_sam.authors()
    theirs, ours = test_sam.sharp_models(authors, sam.CONFIGS["vit_b"])
    picture, predictor = test_sam.picture(720, 1280), authors.Predictor(theirs)
    yield "SAM ViT-B, encoder, 1280x720", {"ours": lambda: ours.encode(picture), "segment-anything":
                                           lambda: predictor.set_image(picture)}
    options = test_sam.COMMON | {"points_per_side": 32}
    generator = authors.Generator(theirs, **options)
    yield "SAM ViT-B, automatic masks of 32x32 points", {
        "ours": lambda: automask.automatic_masks(ours, picture, **options), "segment-anything":
        lambda: generator.generate(picture)}
    tensors = test_midas.random_tensors(test_midas.published(**test_midas.LARGE))
    torch.save(tensors, folder / "dpt.pt")
    our_depth, depth = networks.load("midas", folder / "dpt.pt"), test_midas.peer_of(tensors, test_midas.LARGE)
    photo = torch.rand(1, 3, 384, 384) * 2 - 1
    yield "DPT-Large, 384x384", {"ours": lambda: our_depth(photo), "transformers": lambda: depth(photo)}
    package = test_lpips.authors()
    x, y = test_lpips.pictures(512, 512)
    for name in test_lpips.NAMES:
        metric, peer = test_lpips.models(name, package, folder)
        yield f"LPIPS, {name}, 2 pairs of 512x512", {"ours": lambda m=metric: m(x, y), "lpips":
                                                     lambda p=peer: p(x, y)}


@topic
def networks(args):
    rows = []
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        print(f"Random weights; {torch.get_num_threads()} threads\n")
        with torch.inference_mode():
            for what, runs in network_peers(Path(folder)):
                s = alternate(runs, args.rounds)
                peer = [name for name in runs if name != "ours"][0]
                rows.append([what, f"{s['ours']:.2f}", peer, f"{s[peer]:.2f}", f"{s[peer] / s['ours']:.2f}"])
        table(["what", "ours s", "peer", "peer s", "times as fast"], rows)
        print()
        full_size(Path(folder))


# ---------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if sys.argv[1:2] in (["--once"], ["--network"]):
        {"--once": load_once, "--network": network_once}[sys.argv[1]](*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("--rounds", type=int, default=5, help="all but load: timed runs, of which the median counts")
    parser.add_argument("--fp32", action="store_true", help="load: a checkpoint of 4 GB instead of 2")
    parser.add_argument("--tmp", help="folder for the checkpoints, 3 times that size")
    args = parser.parse_args()
    TOPICS[args.topic](args)
