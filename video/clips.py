"""Clips for data.py: find videos and folders of frames, read a stretch of one, see its cuts."""

import os
import re
import warnings
from collections import Counter
from math import inf
from pathlib import Path

import cv2
import torch

import warp
from video.estimators import dis_flow

LONGEST = 10.0  # seconds between the two frames of a pair, and so of the stretch that is read for one
CAP_PROP_PTS = 71  # of OpenCV from 4.11 on: the number of the frame that was read last, from the time 0 of the file
STEP = 0.15  # seconds between the frames that flow is estimated for; the release: 20 in each 3-second clip
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {
    ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv", ".mts",
    ".m2ts", ".m2t", ".m2v", ".mxf", ".vob", ".gif", ".asf", ".dv", ".divx", ".f4v", ".3g2", ".mpe", ".ogm", ".qt",
    ".rm", ".rmvb", ".y4m",
}
SHARDS = re.compile(r"pairs-\d+\.(tar|json|png)|manifest\.json")  # a preview is no frame of a clip


def find_clips(paths):
    """[(name, path)] of every clip under the paths, in a fixed order. The name does not depend on where it is mounted.

    FileNotFoundError where there is nothing, ValueError where there are no videos. What is left out is named in a
    warning, but for hidden files, as a Mac leaves ._0000.jpg beside 0000.jpg, and for what data.py writes.
    """
    clips = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        if not path.is_dir():
            clips.append((path.name, path))
            continue
        inside = {}  # {ending: files}
        for p in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in p.relative_to(path).parts)
            written = SHARDS.fullmatch(p.name) and (p.parent / "manifest.json").exists()
            if p.is_file() and not hidden and not written:
                inside.setdefault(p.suffix.lower(), []).append(p)
        videos = [p for ending in VIDEOS & inside.keys() for p in inside.pop(ending)]
        mixed = {p.parent for p in videos if p.suffix.lower() != ".gif"}  # pictures among videos are no clip
        folders = {p.parent for ending in PICTURES & inside.keys() for p in inside[ending]} - mixed
        others = Counter()
        for ending, files in inside.items():
            others[ending or "without ending"] = sum(ending not in PICTURES or p.parent in mixed for p in files)
        if others := +others:
            kinds = ", ".join(f"{n} {ending}" for ending, n in sorted(others.items()))
            warnings.warn(f"{path}: skipped what is no clip, by its ending: {kinds}", stacklevel=2)
        if not videos and not folders:
            raise ValueError(f"{path} holds no video and no frames")
        found = [*videos, *folders]
        clips += sorted((f"{path.resolve().name}/{p.relative_to(path).as_posix()}", p) for p in found)
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
    return os.path.join(".", path)  # FFmpeg takes the beginning of 12:30.mp4 for a protocol


def read_window(path, size, fps, rng):
    """A stretch of at most LONGEST seconds from somewhere in a clip, with a frame for about every STEP seconds.

    fps  of a folder of frames; a video says its own
      ->  frames [(size, size, 3) uint8 RGB], times [seconds from the clip's beginning]
    ValueError if it cannot be read, or not to its end.
    """
    path, video = Path(path), None
    if path.is_dir():
        inside = (p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        pictures = sorted(inside, key=lambda p: [  # 2 before 10
            *((int(n), text) for text, n in re.findall(r"(\D*)(\d+)", p.stem)), (0, p.stem)])
        count = len(pictures)
    else:
        video, count, fps = open_video(path)

    # Which frames: every `stride`-th of a stretch, from a random one of its first. Where the rate varies, these are
    # moments, in units of 1 / fps.
    length = min(count, round(LONGEST * fps) + 1)
    stride = min(max(1, round(STEP * fps)), max(1, length - 1))
    start = int(rng.integers(count - length + 1))
    phase = int(rng.integers(max(1, min(stride, length - 2 * stride))))
    numbers = range(start + phase, start + length, stride)
    if video:
        return read_frames(video, name_for_opencv(path), size, count, fps, start, numbers)

    frames = []
    for i in numbers:
        frame = cv2.imread(name_for_opencv(pictures[i]), cv2.IMREAD_COLOR)
        if frame is None:
            raise ValueError(f"frame {i} cannot be read")
        frames.append(cv2.cvtColor(fit_square(frame, size), cv2.COLOR_BGR2RGB))
    return frames, [i / fps for i in numbers]


def open_video(path):
    """-> the video, its length in frames of the same duration, how many of these there are per second"""
    if path.suffix.lower() in PICTURES:
        raise ValueError("is a single picture: give the folder of a clip's frames")
    name = name_for_opencv(path)
    video = cv2.VideoCapture(name)
    if not video.isOpened():
        raise ValueError("is no video that OpenCV can open")
    count, fps = video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)
    if 1 <= fps <= 1000 and 0 < count < 1e8:
        return video, int(count), fps

    # What a browser records does not say how long it is: it is read to its end.
    times, time = [], -inf
    step = 1 / fps if 1 <= fps <= 1000 else 0
    while (time := grab_frame(video, time, step)) is not None:
        times.append(time)
    length = times[-1] - times[0] if times else 0
    if not step and length:
        fps = (len(times) - 1) / length
    if not times or not 1 <= fps <= 1000:
        raise ValueError(f"says that it has {fps:.6g} frames per second, and {len(times)} can be read")
    video.open(name)
    return video, round(length * fps) + 1, fps


def grab_frame(video, previous, step):
    """The next frame -> when it is shown, in seconds; None at the end. A stream without times has one every `step`."""
    if not video.grab():
        return None
    time = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
    return time if time > previous else previous + step


def seek_frame(video, name, number, fps, first):
    """To the frame at number / fps seconds after the time `first`, or to one before it -> when it is shown

    OpenCV looks for it by a constant rate, and in some containers misses it even so. Frames say their times: where it
    went too far, it is sent half as far.
    """
    target = number
    while target:
        video.set(cv2.CAP_PROP_POS_FRAMES, target)
        time = grab_frame(video, -inf, 0)
        if time is not None and (time - first) * fps < number + 0.5:
            return time
        target //= 2
    video.open(name)
    return grab_frame(video, -inf, 0)


def read_frames(video, name, size, count, fps, start, numbers):
    """The frames shown at the moments numbers[i] / fps, or next -> frames and times, as `read_window`"""
    first = time = grab_frame(video, -inf, 0)
    if start and time is not None:
        time = seek_frame(video, name, start, fps, first)

    # A video is decoded from the start of the stretch on; only what is wanted becomes a picture.
    frames, times, places = [], [], []
    wanted = list(numbers)
    while wanted and time is not None:
        place = (time - first) * fps
        places.append(place)
        if place >= numbers.stop:
            break
        if place >= wanted[0] - 0.5:
            frame = video.retrieve()[1]
            if frame is None:
                raise ValueError(f"the frame at {time - first:.2f} s cannot be read")
            frames.append(cv2.cvtColor(fit_square(frame, size), cv2.COLOR_BGR2RGB))
            # Some containers round to milliseconds.
            constant = round(place) / fps
            times.append(constant if abs(time - first - constant) < 0.0011 else time - first)
            wanted = [i for i in wanted if i > place + 0.5]
        time = grab_frame(video, time, 1 / fps)

    # Containers promise a frame or two too many; where the rate varies, a last one may be shown for long.
    steady = not places or abs(places[-1] - places[0] - len(places) + 1) < 1.5
    if time is None and len(wanted) > 1 and steady and video.get(CAP_PROP_PTS) < count - 2:
        raise ValueError(f"breaks off: {len(frames)} of {len(numbers)} frames could be read")
    return frames, times


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
