"""Videos become training pairs for Magic Fixup (section 3.5), in shards.

    python data.py VIDEO_OR_FOLDER ... --out pairs/      what OpenCV opens, or folders of frames
    python data.py clips/ --out pairs/ --workers 16      16 processes
    python data.py clips/ --out pairs/ --shard 3/40      machine 3 of 0 .. 39; torchrun works too
    python data.py clips/ --out pairs/ --flow raft --segments sam --depth midas        as the paper,
                                       by networks whose files checkpoints/published.py finds

Folders are searched for videos; one that holds pictures is one clip. Start an interrupted run again
with the same command, and it goes on; a finished one with more clips, and it adds theirs.

A pair is two frames of one video: the reference I, and later the target I_gt. I, warped towards
I_gt, is the coarse edit. The model learns to turn the coarse edit into the target. The pair with
the number 123 in the list of work is in a WebDataset shard, `pairs-000012.tar`, as

    000123.ref.jpg   000123.gt.jpg        I, I_gt
    000123.flow.png  000123.affine.png    the coarse edit by either motion model. RGBA: alpha is the
                                          mask M, 0 in holes; the colours below it are the model's
                                          input, with holes painted in
    000123.json                           where it comes from and how much moves

The arguments alone decide the list of work: clip after clip, so many pairs of each, cut into
shards; clips that are added later come last, in shards of their own. A pair is a function of its
clip's name and its number, so anyone can make a shard, at any time. It is done when
`pairs-000012.json` (kept, rejected and why) lies beside it. `manifest.json` holds the recipe, the
clips' names and the digests of the networks' files; the last shard adds the totals.
video/batches.py reads the shards for training.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("data.py")

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields

import cv2
import numpy as np
import torch
from tqdm import tqdm

import collage
import warp
from checkpoints import published
from common.cli import Parser, file_name, folder_name, number, report_errors, shorten_warnings, tell
from common.devices import choose_device
from common.files import write_json
from video import estimators, shards
from video.clips import LONGEST, STEP, find_clips, is_cut, read_window
from video.estimators import DEPTH, FLOW, SEGMENTS
from video.motion import affine_edit, flow_edit


@dataclass
class PairRecipe:
    """All that decides the pairs, beside the videos."""

    size: int = 512
    pairs: int = 1  # per clip
    seed: int = 0
    fps: float = 24.0  # of folders of frames
    flow: str = "dis"  # one of video.estimators.FLOW
    segments: str = "classical"
    depth: str = "flow"
    as_paper: bool = False  # the frames are whole seconds apart, or nearly


# Seconds between the two frames: uniform from here to LONGEST, or as far as a shorter clip goes
SHORTEST = 1.0
TRIES = 5  # a pair that is rejected is drawn again
# Rejected, in pixels of a 512x512 picture
TOO_FAR = 350  # the paper: at least 10 % of the picture move so far
TOO_STILL = 50  # the release: 95 % of the picture move less
# The release: a smaller share of the target has a pixel of the reference
COVERED = {"flow": 0.6, "affine": 0.4}
# Of the frames. Colours stay as sharp as brightness, or edges would learn to bleed.
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)

# --------------------------------------------------------------------------------------------------
# From frames to a pair


class Rejected(Exception):
    """No pair, because of `reason`. The message, if any, is for the person."""

    def __init__(self, reason, message=None):
        super().__init__(reason, message)  # as pickle needs them: workers send this to their parent
        self.reason, self.message = reason, message


def choose_frames(times, cuts, rng, as_paper=False):
    """Two frames of one shot, SHORTEST to LONGEST seconds apart where the shot is as long.

    times [n] in seconds; cuts [n - 1] bool: one between i and i + 1. -> i, j
    as_paper: any whole number of seconds (section 3.5), or as near as the frames lie
    Rejected: no shot has two frames.
    """
    # Shots a .. b, both included. A longer one is chosen more often.
    edges = [0, *[i + 1 for i, cut in enumerate(cuts) if cut], len(times)]
    pieces = [(a, b - 1) for a, b in zip(edges, edges[1:]) if b - a > 1]
    shots = [(a, b) for a, b in pieces if times[b] > times[a]]
    if not shots:
        raise Rejected("too short")
    lengths = np.array([times[b] - times[a] for a, b in shots])
    which = rng.choice(len(shots), p=lengths / lengths.sum())
    a, b = shots[which]
    length = float(lengths[which])

    # The frames nearest to two moments.
    apart = length
    if length > SHORTEST:
        most = min(LONGEST, length)
        apart = rng.integers(1, int(most) + 1) if as_paper else rng.uniform(SHORTEST, most)
    begin = times[a] + rng.uniform(0, max(length - apart, 0))
    i = a + int(np.abs(np.array(times[a:b]) - begin).argmin())
    later = np.array(times[i + 1 : b + 1]) - times[i]
    off = np.abs(later - apart)
    off[later < SHORTEST - STEP] += LONGEST  # where frames are rare, the nearest may be too near
    return i, i + 1 + int(off.argmin())


def estimate_steps(estimate, frames, i, j, known):
    """The flows from frame i to i + 1, ..., j - 1 to j: those in known, {i: flow}, and new ones.

    Neighbours are estimated together, because a network then sees each frame once.
    """
    for begin in range(i, j):
        if begin not in known:
            end = next((k for k in range(begin, j) if k in known), j)
            known.update(zip(range(begin, end), estimate(frames[begin : end + 1])))
    return [known[k] for k in range(i, j)]


def compose_steps(steps):
    """Flows (2, H, W) from frame to frame -> the flow from the first frame to the last."""
    flow, *others = steps
    for other in others:
        # Out of frame a pixel goes on as the nearest edge does: little errors would wear the
        # borders away, and what left with the camera may come back with it.
        flow = warp.compose_flow(flow[None], other[None], "border")[0]
    # A median, as in the release (15x15 there; three of 5x5 reach nearly as far).
    planes = []
    for plane in flow.numpy():
        for _ in range(3):
            plane = cv2.medianBlur(np.ascontiguousarray(plane), 5)
        planes.append(plane)
    return torch.from_numpy(np.stack(planes))


def measure_motion(flow):
    """Flow (2, H, W) -> statistics in pixels. Rejected: too much moves too far, or too little."""
    scale = max(flow.shape[1:]) / 512
    p90, p95 = np.percentile(np.hypot(*flow.numpy()), (90, 95)).tolist()
    if p90 >= TOO_FAR * scale:
        raise Rejected("too far")
    if p95 < TOO_STILL * scale:
        raise Rejected("still")
    return dict(moved_90=round(p90, 2), moved_95=round(p95, 2))


def warp_frames(I, I_gt, flow, segment, estimate_depth):
    """Both coarse edits of two frames (H, W, 3) uint8, by a flow (2, H, W) from the first on.

      ->  {model: (coarse (H, W, 3) uint8, holes (H, W) bool)}, how many segments there are
    Rejected: too many holes.
    """
    x, x_gt = (torch.from_numpy(frame).permute(2, 0, 1)[None] / 255 for frame in (I, I_gt))
    edits = {"flow": flow_edit(x, x_gt, flow[None])}
    check_cover(edits, "flow")  # before the slower model
    segments = torch.as_tensor(segment(I))
    depth = torch.as_tensor(estimate_depth(I, flow.numpy()))
    edits["affine"] = affine_edit(x, x_gt, flow[None], segments[None], depth[None])
    check_cover(edits, "affine")
    pictures = {}
    for model, (coarse, holes) in edits.items():
        pixels = (coarse[0] * 255).round().byte().permute(1, 2, 0).numpy()
        pictures[model] = pixels, holes[0, 0].numpy()
    return pictures, int(segments.max())


def check_cover(edits, model):
    """Rejected: the edit by this motion model shows too little of the reference."""
    _, holes = edits[model]
    if 1 - holes.float().mean() < COVERED[model]:
        raise Rejected("holes")


def make_pair(recipe, clip, index, preview=False, weights=None, device="cpu"):
    """Pair `index` of the clip (name, path). -> {extension: bytes}, pictures

    weights, {name: path}, are the files of the recipe's networks, which run on the device. The
    pictures are `draw_row`'s, or None. Rejected: the clip cannot be read, or TRIES pairs are not
    good enough.
    """
    name, path = clip
    seed = hashlib.sha256(f"{recipe.seed} {index} {name}".encode(*shards.ANY_NAME)).digest()
    rng = np.random.default_rng(list(seed))
    try:
        frames, times = read_window(path, recipe.size, recipe.fps, rng)
    except (ValueError, cv2.error) as e:
        raise Rejected("broken", f"{path} {str(e).splitlines()[0]}") from None
    cuts = [is_cut(*two) for two in zip(frames, frames[1:])]
    estimate_flows, segment, estimate_depth = estimators.get_estimators(recipe, weights, device)

    known = {}  # flows, for all tries
    for tries_left in reversed(range(TRIES)):
        try:
            i, j = choose_frames(times, cuts, rng, recipe.as_paper)
            flow = compose_steps(estimate_steps(estimate_flows, frames, i, j, known))
            moved = measure_motion(flow)
            edits, count = warp_frames(frames[i], frames[j], flow, segment, estimate_depth)
            break
        except Rejected:
            if not tries_left:
                raise

    origin = dict(source=name, pair=index, times=[round(times[k], 4) for k in (i, j)], steps=j - i)
    used = dict(segments=count, estimators=[recipe.flow, recipe.segments, recipe.depth])
    notes = origin | dict(size=recipe.size) | moved | used
    files = encode_pair(frames[i], frames[j], edits, notes)
    return files, draw_row(frames[i], frames[j], edits, flow) if preview else None


def encode_pair(I, I_gt, edits, notes):
    """A pair's pictures, edits as of `warp_frames`, and notes -> {extension: bytes}"""
    files = {}
    for model, (coarse, holes) in edits.items():
        # Painting holes in costs more than all else in reading a pair: here it is done once,
        # instead of in every epoch.
        alpha = np.where(holes, 0, 255).astype(np.uint8)
        painted = np.dstack([collage.fill_holes(coarse, holes), alpha])
        files[f"{model}.png"] = shards.encode(painted, ".png", cv2.IMWRITE_PNG_COMPRESSION, 3)
        notes[f"covered_{model}"] = round(1 - holes.mean().item(), 4)
    files["ref.jpg"] = shards.encode(I, ".jpg", *JPEG)
    files["gt.jpg"] = shards.encode(I_gt, ".jpg", *JPEG)
    files["json"] = json.dumps(notes).encode()
    return files


def draw_row(I, I_gt, edits, flow):
    """-> the row of a preview: I, I_gt, both coarse edits with grey holes, the flow's colours"""
    row = [I, I_gt]
    for coarse, holes in edits.values():
        row.append(np.where(holes[..., None], 128, coarse).astype(np.uint8))
    colours = warp.flow_to_colour(flow[None])[0]
    row.append((colours * 255).byte().permute(1, 2, 0).numpy())
    side = min(256, len(I))
    return [cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) for picture in row]


def try_pair(*task):
    """`make_pair`, or the Rejected that it raises: in a worker, that would end the others' work."""
    try:
        return make_pair(*task)
    except Rejected as e:
        return e


def lose_pair(recipe, clip, *_):
    """A clip during which a worker dies, as a decoder does of some broken videos -> Rejected"""
    return Rejected("broken", f"{clip[1]} ends the process that reads it")


# --------------------------------------------------------------------------------------------------
# From pairs to shards


def make_shards(args):
    """The command line's pairs, in shards in args.out."""
    recipe = PairRecipe(**{field.name: getattr(args, field.name) for field in fields(PairRecipe)})
    clips = find_clips(args.videos)
    weights = estimators.find_weights(recipe, args.networks or published.FOLDER)
    if not weights and (args.networks or args.device):
        raise ValueError("--networks, --device are for --flow raft, --segments sam, --depth midas")
    device = choose_device(args.device or "auto") if weights else "cpu"

    # Until here nothing is written. The manifest says what these shards are, to a later run too.
    # A network's file counts, wherever it lies.
    used = {n: {"file": p.name, "sha256": published.digest(p)} for n, p in weights.items()}
    said = {name: value for name, value in asdict(recipe).items() if value is not False}
    manifest, clips, work = shards.begin(args.out, clips, said, used)

    # This machine's part of the shards that are not done. Number k is a pair of clip k // pairs.
    part, parts = args.shard
    mine = range(part, len(work), parts)
    todo = [s for s in mine if not shards.name_shard(args.out, s, "json").exists()]
    numbers = [k for s in todo for k in work[s]]
    tasks = ((recipe, clips[k // recipe.pairs], k % recipe.pairs, args.preview, weights, device)
             for k in numbers)

    # Results come in the order of the tasks, however many workers there are.
    results = shards.run_in_order(try_pair, tasks, args.workers, lose_pair)
    counts = Counter()
    start = time.perf_counter()
    unit = "clip" if recipe.pairs == 1 else "pair"
    with tqdm(total=len(numbers), unit=unit, disable=None) as bar:
        for s in todo:
            kept, rows, rejected = [], [], Counter()
            for k in work[s]:
                result = next(results)
                if isinstance(result, Rejected):
                    rejected[result.reason] += 1
                    if result.message:
                        bar.write(f"data.py: skipped: {result.message}", file=sys.stderr)
                else:
                    files, row = result
                    kept.append((k, files))
                    if row and len(rows) < 8:
                        rows.append(row)
                bar.update()
                bar.set_postfix(counts + rejected + Counter(kept=len(kept)), refresh=False)
            shards.write_shard(args.out, s, kept, rows, rejected)
            counts += rejected + Counter(kept=len(kept))

    if numbers:
        seconds = time.perf_counter() - start
        rate = len(numbers) / recipe.pairs / seconds
        tell(f"{args.out}: {shards.summarize(counts)} in {seconds:.0f} s, {rate:.2f} clips/s")
    done, counts = shards.add_up(args.out, len(work))
    if done == len(work):
        write_json(args.out / "manifest.json", {"totals": dict(sorted(counts.items()))} | manifest)
        if not counts["kept"]:
            found = shards.summarize(counts)
            raise ValueError(f"{args.out}: {found}: there is nothing to train on")
    tell(f"{args.out}: {done} of {len(work)} shards are there: {shards.summarize(counts)}")


# --------------------------------------------------------------------------------------------------
# The command line


def read_part(text):
    """'3/40' -> (3, 40)"""
    try:
        i, n = (int(s) for s in text.split("/"))
        if 0 <= i < n:
            return i, n
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no part of the work like 0/4, 1/4, 2/4 or 3/4")


def parse(argv):
    p = Parser(prog="data.py", description=__doc__)
    add = p.add_argument
    add("videos", nargs="+", type=file_name, metavar="VIDEO_OR_FOLDER")
    add("--out", type=folder_name, required=True, metavar="DIR", help="where the shards go")
    p.set_defaults(**asdict(PairRecipe()))  # of the next eight options
    add("--size", type=number(int, 32, 4096), help="side in pixels (default: 512)")
    add("--pairs", type=number(int, 1, 1000), help="per clip (default: 1, as the paper)")
    add("--seed", type=number(int, 0, 2**63 - 1))
    add("--fps", type=number(float, 1, 1000), help="of folders of frames (default: 24)")
    add("--flow", choices=FLOW)
    add("--segments", choices=SEGMENTS)
    add("--depth", choices=DEPTH)
    add("--as-paper", action="store_true", help="frames are whole seconds apart, 1 to 10")
    add("--networks", type=folder_name, metavar="DIR", help="where they lie (default: weights)")
    add("--device", help="of raft, sam, midas: auto, cpu, cuda, mps (default: auto)")
    add("--preview", action="store_true", help="also a sheet per shard, pairs-000012.png")
    add("--workers", type=number(int, 1, 1024), default=1, help="processes, one thread each")
    add("--shard", type=read_part, metavar="I/N", help="part of the work (default: by torchrun)")
    args = p.parse_args(argv)
    if args.shard is None:
        try:
            rank, world = os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)
            args.shard = read_part(f"{rank}/{world}")
        except argparse.ArgumentTypeError:
            p.error("the environment's RANK and WORLD_SIZE make no sense: give --shard I/N")
    return p, args


def main(argv=None):
    parser, args = parse(argv)
    shorten_warnings(parser)
    try:
        memory = "fewer --workers, or --device cpu. What is done is kept"
        with report_errors(parser, memory, "what is done is kept; the same command goes on"):
            make_shards(args)
    except BrokenProcessPool:
        parser.error("workers died of two clips in a row: too little memory, or a failing driver. "
                     "What is done is kept")


if __name__ == "__main__":
    main()
