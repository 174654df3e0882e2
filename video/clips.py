"""Clips for data.py: find videos and folders of frames, read a stretch of one, see its cuts."""

import re
from pathlib import Path

import cv2
import torch

import warp
from video.estimators import dis_flow

LONGEST = 10.0  # seconds between the two frames of a pair, and so of the stretch that is read for one
STEP = 0.15  # seconds between the frames that flow is estimated for; the release: 20 in each 3-second clip
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def find_clips(paths):
    """[(name, path)] of every clip under the paths, in a fixed order. The name does not depend on where it is mounted.

    FileNotFoundError where there is nothing, ValueError where there are no videos.
    """
    clips = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        found = [(path.name, path)]
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
            found = [p for p in inside if p.suffix.lower() in VIDEOS]
            mixed = {p.parent for p in found}  # pictures among videos are no clip
            found += {p.parent for p in inside if p.suffix.lower() in PICTURES} - mixed
            found = sorted((f"{path.resolve().name}/{p.relative_to(path).as_posix()}", p) for p in found)
        if not found:
            raise ValueError(f"{path} holds no video and no frames")
        clips += found
    return clips


def fit_square(frame, size):
    """(h, w, 3) -> (size, size, 3): the middle square, resized"""
    h, w = frame.shape[:2]
    side = min(h, w)
    frame = frame[(h - side) // 2 : (h + side) // 2, (w - side) // 2 : (w + side) // 2]
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)


def name_for_opencv(path):
    """ValueError for a name that is not UTF-8, over which OpenCV would end the process."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise ValueError("has a name that is not UTF-8: rename it")
    return str(path)


def sort_naturally(paths):
    """2 before 10"""

    def key(path):
        return [(int(n), text) for text, n in re.findall(r"(\D*)(\d+)", path.stem)] + [(0, path.stem)]

    return sorted(paths, key=key)


def read_window(path, size, fps, rng):
    """A stretch of at most LONGEST seconds from somewhere in a clip, with a frame for about every STEP seconds.

    fps  of a folder of frames; a video says its own
      ->  frames [(size, size, 3) uint8 RGB], times [seconds from the clip's beginning]
    ValueError if it cannot be read, or not to its end.
    """
    path, video = Path(path), None
    if path.is_dir():
        pictures = sort_naturally(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        count = len(pictures)
    else:
        video = cv2.VideoCapture(name_for_opencv(path))
        if not video.isOpened():
            raise ValueError("is no video that OpenCV can open")
        count, fps = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), video.get(cv2.CAP_PROP_FPS)
        if not 1 <= fps <= 1000 or not 0 < count < 1e8:
            raise ValueError(f"says that it has {count} frames at {fps:.6g} per second")

    # Which frames: every `stride`-th of a stretch, from a random one of its first.
    length = min(count, round(LONGEST * fps) + 1)
    stride = min(max(1, round(STEP * fps)), max(1, length - 1))
    start = int(rng.integers(count - length + 1))
    phase = int(rng.integers(max(1, min(stride, length - 2 * stride))))
    numbers = range(start + phase, start + length, stride)

    # A video is decoded from the start of the stretch on; only what is wanted becomes a picture.
    frames = []
    if video and start:
        video.set(cv2.CAP_PROP_POS_FRAMES, start)
    for i in range(start, numbers[-1] + 1):
        if video and not video.grab():
            break
        if i in numbers:
            frame = video.retrieve()[1] if video else cv2.imread(name_for_opencv(pictures[i]), cv2.IMREAD_COLOR)
            if frame is None:
                raise ValueError(f"frame {i} cannot be read")
            frames.append(cv2.cvtColor(fit_square(frame, size), cv2.COLOR_BGR2RGB))
    if len(frames) < len(numbers) - 1:  # containers promise a frame or two too many
        raise ValueError(f"breaks off: {len(frames)} of {len(numbers)} frames could be read")
    return frames, [i / fps for i in numbers[: len(frames)]]


def is_cut(first, second):
    """Whether a shot ends between two frames: flow explains less than 3 pixels in 10.

    Explained is a pixel whose flow leads to its own colour and back home. Where motion is too quick for that, a pair
    had better not cross either. Judged at 128 pixels, where it costs 3 ms.
    """
    small = [cv2.resize(frame, (128, 128), interpolation=cv2.INTER_AREA) for frame in (first, second)]
    there, back = (dis_flow(*pair, cv2.DISOPTICAL_FLOW_PRESET_FAST)[None] for pair in (small, small[::-1]))
    a, b = (torch.from_numpy(s).permute(2, 0, 1)[None].float() for s in small)
    same = (a - warp.backwarp(b, there)).abs().mean(1, keepdim=True) < 30
    return (same & warp.forward_backward_consistency(there, back)).float().mean().item() < 0.3
