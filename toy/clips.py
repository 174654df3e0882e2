"""Clips of the toy world, for data.py: as in videos, things turn, sway, bounce, open, grow and pass before each other,
and camera, lens, focus and light move.

    python -m toy.clips runs/clips --count 1500        1500 folders of 21 frames
    python data.py runs/clips --out runs/pairs --size 128 --pairs 4 --fps 6.67

A clip is a function of the seed and its number. The same command goes on where it was interrupted.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("python -m toy.clips")

import math
import shutil
from dataclasses import replace

import torch
from PIL import Image
from tqdm import tqdm

from common.cli import Parser, folder_name, number, report_errors
from common.files import check_writable
from common.run_state import generator_at
from toy.world import random_scenes, render

FRAMES = 21  # of a clip. At 20 / 3 per second it lasts three seconds, and data.py takes every frame
TOGETHER = 16  # clips that are rendered at once


class Clip:
    """n clips, as functions of the time in 0 .. 1: scenes of the toy world in which things move as in a video."""

    def __init__(self, n, generator):
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(*shape, generator=generator)

        def some(share, *shape):
            return (torch.rand(*shape, generator=generator) < share).float()

        self.scenes = s = random_scenes(n, generator)
        K = s.x.shape[1]
        # Most cameras stand still, so that what moves is an object, as when a user edits.
        moving = some(0.4, n)
        walks = some(0.7, n, K)
        walks[:, 0] = torch.maximum(walks[:, 0], 1 - moving)
        z = (s.z * uniform(-0.5, 0.5, n, K).exp()).clamp(2.0, 5.2)
        self.to = torch.stack([(uniform(-0.1, 1.1, n, K) - 0.5) * z, z], -1)  # world x, z at the end
        self.to = torch.lerp(torch.stack([s.x, s.z], -1), self.to, walks[..., None])
        self.camera = torch.stack([uniform(-0.5, 0.5, n), uniform(-0.3, 0.3, n)], 1) * (moving * some(0.6, n))[:, None]
        self.zoom = uniform(-0.3, 0.3, n) * moving * some(0.4, n)
        self.pan = uniform(-0.15, 0.15, n, 2) * torch.tensor([1.0, 0.3]) * (moving * some(0.4, n))[:, None]
        self.sun = uniform(-0.5, 0.5, n) * some(0.2, n)
        self.aperture, self.focus = uniform(0.02, 0.1, n) * some(0.2, n), uniform(0.2, 0.5, n)
        self.turn = uniform(-2.5, 2.5, n, K) * some(0.5, n, K)
        self.start = uniform(-math.pi, math.pi, n, K) * some(0.5, n, K)
        self.grow = uniform(-0.3, 0.3, n, K) * some(0.3, n, K)
        # What goes to and fro: how far, how often, from where in the swing
        self.lean = uniform(0.05, 0.3, n, K) * some(0.3, n, K)
        self.spread = uniform(0.05, 0.3, n, K) * some(0.3, n, K)
        self.lift = uniform(0.1, 0.5, n, K) * some(0.3, n, K)
        self.often, self.phase = uniform(0.5, 2.0, n, K), uniform(0, 2 * math.pi, n, K)

    def __call__(self, time):
        """-> the scenes (n) at this time"""
        s = self.scenes
        swing = (2 * math.pi * self.often * time + self.phase).sin()
        place = torch.lerp(torch.stack([s.x, s.z], -1), self.to, time)
        sun = s.sun + time * self.sun
        near_side = sun.cos().sign() * sun.cos().abs().clamp(min=0.42)  # no shadow is infinitely thin
        return replace(
            s, x=place[..., 0], z=place[..., 1], camera=time * self.camera, zoom=time * self.zoom, pan=time * self.pan,
            sun=torch.atan2(sun.sin(), near_side), size=s.size * (time * self.grow).exp(), aperture=self.aperture,
            focus=self.focus, turn=self.start + time * self.turn, lean=self.lean * swing, spread=self.spread * swing,
            lift=self.lift * swing.abs(),
        )


def write_clips(out, count, size, seed):
    """`count` clips, each a folder of PNGs: OUT/00000/00.png. It appears whole or not at all."""
    unfinished = out.with_name(f"{out.name}.unfinished")  # not in OUT, where data.py would find it
    shutil.rmtree(unfinished, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for begin in tqdm(range(0, count, TOGETHER), unit="batch", mininterval=1):
        missing = [k for k in range(begin, min(count, begin + TOGETHER)) if not (out / f"{k:05d}").is_dir()]
        if not missing:
            continue
        clip = Clip(TOGETHER, generator_at(seed, begin))
        for frame in range(FRAMES):
            images = (render(clip(frame / (FRAMES - 1)), size).image * 255).round().byte()
            for k in missing:
                path = unfinished / f"{k:05d}" / f"{frame:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[k - begin].permute(1, 2, 0).numpy()).save(path, compress_level=1)
        for k in missing:
            (unfinished / f"{k:05d}").rename(out / f"{k:05d}")
    shutil.rmtree(unfinished, ignore_errors=True)


def main(argv=None):
    parser = Parser(prog="python -m toy.clips", description=__doc__)
    parser.add_argument("out", type=folder_name, metavar="DIR")
    parser.add_argument("--count", type=number(int, 1, 99_999), default=1500, help="clips (default: 1500)")
    parser.add_argument("--size", type=number(int, 32, 1024), default=128, help="of a frame (default: 128)")
    parser.add_argument("--seed", type=number(int, 0, 900), default=0)
    args = parser.parse_args(argv)
    with report_errors(parser, "a smaller --size", "clips that are done are kept; the same command goes on"):
        check_writable(args.out)
        write_clips(args.out, args.count, args.size, args.seed)


if __name__ == "__main__":
    main()
