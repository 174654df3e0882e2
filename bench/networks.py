"""-m bench's topic of the networks that the papers lean on: RAFT, Segment Anything, DPT-Large, LPIPS.

Beside their peers on the same random weights, and at the full size of what is published, each in a process of its own.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench import peers as bench_peers  # noqa: F401, so that tests/ and torchvision can be imported
from bench.clock import Watch, compare, held, in_own_process, summary, turns
from checkpoints import published
from networks import automask, midas, raft, sam

# ---------------------------------------------------------------------------------------------------------------------
# At full size

FULL = {
    "raft": ("RAFT-Large", raft.RAFT),
    "sam": ("SAM ViT-H", lambda: sam.SAM(sam.CONFIGS["vit_h"])),
    "midas": ("DPT-Large", lambda: midas.DPT(midas.DPTConfig())),
}


def network_once(kind, path, dtype):
    """Load a published file, then one picture of 1280x720 (RAFT: a pair of them)."""
    first, second = torch.randint(0, 256, (2, 720, 1280, 3), dtype=torch.uint8).numpy()
    with Watch() as loading:
        model = published.load(kind, path, getattr(torch, dtype))
    run = {"raft": lambda: raft.clip_flows(model, [first, second]), "sam": lambda: model.encode(first),
           "midas": lambda: midas.depth(model, first)}[kind]
    with torch.inference_mode(), Watch() as running:
        run()
        start = time.perf_counter()  # the second time the weights have been read from the disk
        run()
        seconds = time.perf_counter() - start
    return {"loading": loading.seconds, "seconds": seconds, "total": running.total + running.start - loading.start}


def full_row(o, kind, dtype):
    with tempfile.TemporaryDirectory(dir=o.tmp) as folder:
        path = Path(folder) / f"{kind}.pth"
        torch.save(FULL[kind][1]().state_dict(), path)
        once = partial(in_own_process, "bench.networks.network_once", kind=kind, path=str(path), dtype=dtype)
        done = turns({"ours": once}, o, warm=lambda name: None)["ours"]  # each warms itself up
        gigabytes = path.stat().st_size / 1e9
    return {"file GB": gigabytes, "precision": dtype, "load s": summary([r["loading"] for r in done]),
            "peak GiB": summary([r["total"] / 1024 for r in done]),
            "s per picture": summary([r["seconds"] for r in done])}


# ---------------------------------------------------------------------------------------------------------------------
# Beside their peers: functions -> ours, the peer's


def raft_pair():
    from torchvision.models.optical_flow import raft_large

    flow = raft_large(weights=None).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(flow.state_dict(), Path(folder) / "raft.pth")
        ours = published.load("raft", Path(folder) / "raft.pth")
    first, second = torch.rand(2, 1, 3, 520, 960) * 2 - 1
    return lambda: ours(first, second), lambda: flow(first, second, num_flow_updates=12)


def sam_models():
    import test_sam

    authors = test_sam.authors()
    return authors, *test_sam.sharp_models(authors, sam.CONFIGS["vit_b"]), test_sam.picture(720, 1280)


def encoder_pair():
    authors, theirs, ours, picture = held(sam_models)
    predictor = authors.Predictor(theirs)
    return lambda: ours.encode(picture), lambda: predictor.set_image(picture)


def masks_pair():
    import test_sam

    authors, theirs, ours, picture = held(sam_models)
    options = test_sam.COMMON | {"points_per_side": 32}
    generator = authors.Generator(theirs, **options)
    return lambda: automask.automatic_masks(ours, picture, **options), lambda: generator.generate(picture)


def midas_pair():
    import test_midas

    tensors = test_midas.random_tensors(test_midas.published(**test_midas.LARGE))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tensors, Path(folder) / "dpt.pt")
        ours = published.load("midas", Path(folder) / "dpt.pt")
    peer, photo = test_midas.peer_of(tensors, test_midas.LARGE), torch.rand(1, 3, 384, 384) * 2 - 1
    return lambda: ours(photo), lambda: peer(photo)


def lpips_pair(name):
    import test_lpips
    import torchvision  # noqa: F401, before `authors`, which makes Python forget what is first imported inside of it

    x, y = test_lpips.pictures(512, 512)
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = test_lpips.models(name, test_lpips.authors(), Path(folder))
    return lambda: ours(x, y), lambda: peer(x, y)


def peer_row(o, make, name):
    return compare(o, *make(), name, same=False)


def skipped_is_missing(row):
    """The tests' helpers skip where a peer is not installed. Here that is an ImportError."""

    def told():
        import pytest

        try:
            with torch.inference_mode():
                return row()
        except pytest.skip.Exception as e:
            raise ImportError(str(e)) from None

    return told


def leaned_on(o):
    """The networks that the papers lean on, with random weights: beside their peers; and at the full size of what is
    published, each in a process of its own: loading, memory above the bare program's, and one picture of 1280x720 (for
    RAFT two, the flow between them)."""
    pairs = {
        "RAFT-Large, 960x520, 12 updates": (raft_pair, "torchvision"),
        "SAM ViT-B, encoder, 1280x720": (encoder_pair, "segment-anything"),
        "SAM ViT-B, automatic masks of 32x32 points": (masks_pair, "segment-anything"),
        "DPT-Large, 384x384": (midas_pair, "transformers"),
    } | {f"LPIPS, {name}, 2 pairs of 512x512": (partial(lpips_pair, name), "lpips") for name in published.LPIPS}
    rows = {what: skipped_is_missing(partial(peer_row, o, *pair)) for what, pair in pairs.items()}
    dtypes = {"fp32": ["float32"], "bf16": ["bfloat16"]}.get(o.dtype, ["float32", "bfloat16"])
    return rows | {f"{FULL[kind][0]}, {dtype}": partial(full_row, o, kind, dtype) for kind in FULL for dtype in dtypes}


TOPICS = {"networks": ("The networks that the papers lean on", leaned_on)}
