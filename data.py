"""Videos become training pairs for Magic Fixup (section 3.5), in WebDataset shards.

    python data.py VIDEO_OR_FOLDER ... --out pairs/      any video that OpenCV opens, or a folder of frames
    python data.py clips/ --out pairs/ --workers 16 --shard 3/40        machine 3 of 0 .. 39; torchrun works as well
    python data.py clips/ --out pairs/ --flow raft --segments sam --depth midas     by the networks that the paper used,
                                                                        whose files checkpoints/published.py finds

Folders are searched for videos; one that holds pictures is one clip. An interrupted run goes on when it is started
again with the same words. The list of work is a function of the arguments alone: clip after clip, so many pairs of
each, cut into shards; and each pair is a function of its clip's name and its number. So a shard is made whole or not
at all, by whom and when does not matter, and what has a `pairs-000012.json` (kept, rejected and why) is done. Beside
it lies `pairs-000012.tar`, with these files for the pair that has the number 123 in the list:

    000123.ref.jpg   000123.gt.jpg          the reference I, the target I_gt
    000123.flow.png  000123.affine.png      I, warped towards I_gt by either motion model. RGBA: alpha is the mask M, 0
                                            in holes; the colours below it are the model's input, with holes painted in
    000123.json                             where it comes from and how much moves

pairs.py reads them. `manifest.json` holds the recipe, with the digests of the networks' files, and once every shard is
there, the totals.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import collage
import warp
from checkpoints import published
from common.cli import Parser, number, report_errors
from common.devices import choose_device
from common.files import write_json
from pairs import ShardPairs, ToyPairs, affine_edit, flow_edit, toy_pairs
from video import estimators
from video.clips import LONGEST, find_clips, is_cut, read_window
from video.estimators import DEPTH, FLOW, SEGMENTS
from video.shards import in_order, summary, totals_of, work, write_preview, write_shard

__all__ = ["ShardPairs", "ToyPairs", "toy_pairs"]  # the other half of this idea: reading pairs, from here and elsewhere


@dataclass
class Recipe:
    """What decides the pairs, but for the videos themselves."""

    size: int = 512
    pairs: int = 1  # per clip, as the paper
    seed: int = 0
    fps: float = 24.0  # of folders of frames
    flow: str = "dis"
    segments: str = "classical"
    depth: str = "flow"


SHORTEST = 1.0  # seconds between the two frames, up to videos.LONGEST, uniformly; shorter clips as far as they go
ANY_NAME = "utf-8", "surrogateescape"  # a file's name need not be UTF-8
TRIES = 5  # a pair that is rejected is drawn again
# Rejected, in pixels of a 512x512 picture
TOO_FAR = 350  # the paper: at least 10 % of the picture move so far
TOO_STILL = 50  # the release: 95 % of the picture move less
COVERED = {"flow": 0.6, "affine": 0.4}  # the release: a smaller share of the target has a pixel of the reference

# ---------------------------------------------------------------------------------------------------------------------
# From frames to a pair


def choose_pair(times, cuts, rng):
    """Which frames: SHORTEST to LONGEST seconds apart, within one shot. times [n], cuts [n - 1] bool: one between i and
    i + 1. -> (i, j), or None if no shot has two frames.
    """
    edges = [0, *[i + 1 for i, cut in enumerate(cuts) if cut], len(times)]
    shots = [(a, b - 1) for a, b in zip(edges, edges[1:]) if b - a > 1]
    if not shots:
        return None
    length = np.array([times[b] - times[a] for a, b in shots])
    which = rng.choice(len(shots), p=length / length.sum())
    (a, b), length = shots[which], float(length[which])
    apart = rng.uniform(SHORTEST, min(LONGEST, length)) if length > SHORTEST else length
    begin = times[a] + rng.uniform(0, max(length - apart, 0))
    i = min(int(np.abs(np.array(times[a:b]) - begin).argmin()) + a, b - 1)
    j = int(np.abs(np.array(times[i + 1 : b + 1]) - times[i] - apart).argmin()) + i + 1
    return i, j


def smoothed(flow):
    """Flow (2, H, W) by a median, as the release (15x15 there; three of 5x5 reach nearly as far)."""
    for _ in range(3):
        flow = np.stack([cv2.medianBlur(np.ascontiguousarray(plane), 5) for plane in np.asarray(flow)])
    return torch.from_numpy(flow)


def motion_of(flow):
    """Flow (2, H, W) -> the reason to reject it or None, and statistics in pixels"""
    scale = max(flow.shape[1:]) / 512
    p90, p95 = np.percentile(np.hypot(*flow.numpy()), (90, 95)).tolist()
    reason = "too far" if p90 >= TOO_FAR * scale else "still" if p95 < TOO_STILL * scale else None
    return reason, dict(moved_90=round(p90, 2), moved_95=round(p95, 2))


def flows_between(estimate, frames, i, j, known):
    """The flows from frame i to i + 1, ..., j - 1 to j. Those not in known, {i: flow}, are estimated, and added to it:
    neighbours together, because a network then sees each frame once."""
    for begin in range(i, j):
        if begin not in known:
            end = next((k for k in range(begin, j) if k in known), j)
            known.update(zip(range(begin, end), estimate(frames[begin : end + 1])))
    return [known[k] for k in range(i, j)]


def covered(edits, model):
    """Whether the edit by this motion model shows enough of the reference."""
    return 1 - edits[model][1].float().mean() >= COVERED[model]


def encoded(image, extension, *options):
    return cv2.imencode(extension, image[..., [2, 1, 0, 3][: image.shape[2]]], options)[1].tobytes()


def make_pair(recipe, clip, index, preview=False, weights=None, device="cpu"):
    """Pair `index` of the clip (name, path). -> reason of rejection (None: kept), message, {extension: bytes}, picture

    weights, {name: path}, are the files of the recipe's networks, which run on the device. The picture is a row of the
    preview: I, I_gt, both coarse edits with grey holes, the flow's colours.
    """
    name, path = clip
    seed = hashlib.sha256(f"{recipe.seed} {index} {name}".encode(*ANY_NAME)).digest()
    rng = np.random.default_rng(list(seed))
    try:
        frames, times = read_window(path, recipe.size, recipe.fps, rng)
    except (ValueError, cv2.error) as e:
        return "broken", f"{path} {str(e).splitlines()[0]}", None, None
    cuts = [is_cut(*two) for two in zip(frames, frames[1:])]
    estimate_flows, segment, estimate_depth = (
        estimators.estimator(table, name, weights, device)
        for table, name in ((FLOW, recipe.flow), (SEGMENTS, recipe.segments), (DEPTH, recipe.depth)))
    known = {}
    for _ in range(TRIES):
        if (ends := choose_pair(times, cuts, rng)) is None:
            return "too short", None, None, None
        flow, *others = flows_between(estimate_flows, frames, *ends, known)
        for other in others:
            # Out of frame a pixel goes on as the nearest edge does: little errors would wear the borders away, and what
            # left with the camera may come back with it.
            flow = warp.compose_flow(flow[None], other[None], "border")[0]
        flow = smoothed(flow)
        reason, statistics = motion_of(flow)
        if reason:
            continue
        I, I_gt = frames[ends[0]], frames[ends[1]]
        x, x_gt = (torch.from_numpy(f).permute(2, 0, 1)[None] / 255 for f in (I, I_gt))
        edits, reason = {"flow": flow_edit(x, x_gt, flow[None])}, "holes"
        if not covered(edits, "flow"):
            continue
        segments = torch.as_tensor(segment(I))
        depth = torch.as_tensor(estimate_depth(I, flow.numpy()))
        edits["affine"] = affine_edit(x, x_gt, flow[None], segments[None], depth[None])
        if covered(edits, "affine"):
            break
    else:
        return reason, None, None, None

    files, row = {}, [I, I_gt]
    for model, (coarse, holes) in edits.items():
        coarse, holes = (coarse[0] * 255).round().byte().permute(1, 2, 0).numpy(), holes[0, 0].numpy()
        alpha = np.where(holes, 0, 255).astype(np.uint8)
        # Painting holes in costs more than all else in reading a pair: here, once, instead of in every epoch.
        painted = np.dstack([collage.fill_holes(coarse, holes), alpha])
        files[f"{model}.png"] = encoded(painted, ".png", cv2.IMWRITE_PNG_COMPRESSION, 3)
        statistics[f"covered_{model}"] = round(1 - holes.mean().item(), 4)
        row.append(np.where(holes[..., None], 128, coarse).astype(np.uint8))
    for key, image in (("ref.jpg", I), ("gt.jpg", I_gt)):
        files[key] = encoded(image, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 95)
    times = [round(times[i], 4) for i in ends]
    told = dict(source=name, pair=index, times=times, steps=ends[1] - ends[0], size=recipe.size, **statistics,
                segments=int(segments.max()), estimators=[recipe.flow, recipe.segments, recipe.depth])
    files["json"] = json.dumps(told).encode()
    if not preview:
        return None, None, files, None
    row.append((warp.flow_to_colour(flow[None])[0] * 255).byte().permute(1, 2, 0).numpy())
    side = min(256, recipe.size)
    return None, None, files, [cv2.resize(r, (side, side), interpolation=cv2.INTER_AREA) for r in row]


# ---------------------------------------------------------------------------------------------------------------------
# From pairs to shards


def run(args):
    recipe = Recipe(args.size, args.pairs, args.seed, args.fps, args.flow, args.segments, args.depth)
    clips = find_clips(args.videos)
    weights = estimators.find((recipe.flow, recipe.segments, recipe.depth), args.networks or published.FOLDER)
    if not weights and (args.networks or args.device):
        raise ValueError("--networks and --device are for --flow raft, --segments sam and --depth midas")
    device = choose_device(args.device or "auto") if weights else "cpu"
    estimators.model.cache_clear()  # of an earlier run in this process: another file may have the same path by now
    shards = work(recipe, clips)
    names = hashlib.sha256("\n".join(name for name, _ in clips).encode(*ANY_NAME)).hexdigest()
    manifest = {"recipe": asdict(recipe), "clips": len(clips), "clips_sha256": names, "shards": len(shards)}
    if weights:  # where they lie does not matter
        manifest["networks"] = {n: {"file": path.name, "sha256": published.digest(path)} for n, path in weights.items()}
    begun = args.out / "manifest.json"
    if begun.exists():
        try:
            there = json.loads(begun.read_bytes())
            other = next((key for key, value in manifest.items() if there[key] != value), None)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{begun} is damaged: choose another --out") from None
        if other:
            raise ValueError(f"{args.out} was begun with other {other.replace('_sha256', '')}: choose another --out")
    elif args.out.is_dir() and any(args.out.glob("*.tar")):
        raise ValueError(f"{args.out} holds shards, but no manifest.json: choose another --out")
    else:
        write_json(begun, manifest)

    part, parts = args.shard
    todo = [s for s in range(part, len(shards), parts) if not (args.out / f"pairs-{s:06d}.json").exists()]
    numbers, counts, begin = [k for s in todo for k in shards[s]], Counter(), time.perf_counter()
    tasks = ((recipe, clips[k // recipe.pairs], k % recipe.pairs, args.preview, weights, device) for k in numbers)
    results = in_order(make_pair, tasks, args.workers)
    with tqdm(total=len(numbers), unit="clip" if recipe.pairs == 1 else "pair", disable=None) as bar:
        for s in todo:
            samples, rows, rejected = [], [], Counter()
            for k in shards[s]:
                reason, message, files, row = next(results)
                if message:
                    bar.write(f"data.py: skipped: {message}", file=sys.stderr)
                if reason:
                    rejected[reason] += 1
                else:
                    samples.append((k, files))
                    rows += [row] if row and len(rows) < 8 else []
                counts[reason or "kept"] += 1
                bar.update()
                bar.set_postfix(counts, refresh=False)
            path = args.out / f"pairs-{s:06d}.tar"
            if samples:
                write_shard(path, samples)
            if rows:
                write_preview(path.with_suffix(".png"), rows)
            write_json(path.with_suffix(".json"), {"kept": len(samples), "rejected": rejected})
    if numbers:
        seconds = time.perf_counter() - begin
        rate = len(numbers) / recipe.pairs / seconds
        print(f"{args.out}: {summary(counts)} in {seconds:.0f} s, {rate:.2f} clips/s")
    done, counts = totals_of(args.out, len(shards))
    if done == len(shards):
        write_json(begun, manifest | {"totals": dict(sorted(counts.items()))})
        if not counts["kept"]:
            raise ValueError(f"{args.out}: {summary(counts)}: there is nothing to train on")
    print(f"{args.out}: {done} of {len(shards)} shards are there: {summary(counts)}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def part_of(text):
    try:
        i, n = (int(s) for s in text.split("/"))
        if 0 <= i < n:
            return i, n
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no part of the work like 0/4, 1/4, 2/4 or 3/4")


def parse(argv):
    p = Parser(prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("videos", nargs="+", metavar="VIDEO_OR_FOLDER")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    p.add_argument("--size", type=number(int, 32, 4096), default=Recipe.size, help="side in pixels (default: 512)")
    p.add_argument("--pairs", type=number(int, 1, 1000), default=Recipe.pairs,
                   help="per clip (default: 1, as the paper)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=Recipe.seed)
    p.add_argument("--fps", type=number(float, 1, 1000), default=Recipe.fps, help="of folders of frames (default: 24)")
    p.add_argument("--flow", choices=FLOW, default=Recipe.flow)
    p.add_argument("--segments", choices=SEGMENTS, default=Recipe.segments)
    p.add_argument("--depth", choices=DEPTH, default=Recipe.depth)
    p.add_argument("--networks", type=Path, metavar="DIR",
                   help="where the files of raft, sam, midas lie (default: weights)")
    p.add_argument("--device", help="of raft, sam, midas: auto, cpu, cuda, mps (default: auto); they round differently")
    p.add_argument("--preview", action="store_true", help="also a sheet per shard, pairs-000012.png")
    p.add_argument("--workers", type=number(int, 1, 1024), default=1, help="processes, one thread each")
    p.add_argument("--shard", type=part_of, metavar="I/N", help="only this part of the work (default: torchrun's rank)")
    args = p.parse_args(argv)
    if args.shard is None:
        try:
            args.shard = part_of(f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}")
        except argparse.ArgumentTypeError:
            p.error("the environment's RANK and WORLD_SIZE make no sense: give --shard I/N")
    return p, args


def main(argv=None):
    parser, args = parse(argv)
    try:
        with report_errors(parser, "fewer --workers, or --device cpu. What is done is kept"):
            run(args)
    except BrokenProcessPool:
        parser.error("a worker died: too little memory, or a video that crashes the decoder. What is done is kept")
    except KeyboardInterrupt:
        parser.exit(130, "data.py: interrupted; the same command goes on from here\n")


if __name__ == "__main__":
    main()
