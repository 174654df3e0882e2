"""The folder of shards that data.py writes: its list of work, the processes that do it, the files, and reading them.

data.py's docstring says what a shard holds, and when it is done. Every file is there whole or not at all.
"""

import functools
import io
import itertools
import json
import os
import signal
import tarfile
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from common.files import atomic_write, write_json
from common.pictures import labelled

# ---------------------------------------------------------------------------------------------------------------------
# The work


def list_work(pairs):
    """The numbers 0 .. pairs - 1 as a list of ranges, one per shard.

    A shard holds up to 256 pairs, some 150 MB; fewer, where there would be less than 64 shards for many machines.
    """
    per_shard = min(256, max(8, pairs // 64))
    return [range(k, min(k + per_shard, pairs)) for k in range(0, pairs, per_shard)]


def run_in_order(make, tasks, workers):
    """make(*task) for every task, in order, in `workers` processes, which run no further ahead than a few each."""
    if workers == 1:
        threads = torch.get_num_threads()
        quieten()
        try:
            yield from itertools.starmap(make, tasks)
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        try:
            ahead = deque()
            for task in tasks:
                ahead.append(pool.submit(make, *task))
                if len(ahead) > 4 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker():
    """In a process of its own: one thread, and gone when the parent is, even by kill -9."""
    quieten()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def quieten():
    """One thread; and decoders keep quiet about broken videos, which data.py reports in one line."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def name_shard(out, number, ending):
    """The path of a shard (tar), of what says that it is done (json), or of its preview (png)."""
    return out / f"pairs-{number:06d}.{ending}"


def begin(out, manifest):
    """Write the manifest of a new folder. ValueError: it has one that says otherwise, or shards and none."""
    path = out / "manifest.json"
    if not path.exists():
        if out.is_dir() and any(out.glob("*.tar")):
            raise ValueError(f"{out} holds shards, but no manifest.json: choose another --out")
        write_json(path, manifest)
        return
    try:
        there = json.loads(path.read_bytes())
        other = next((key for key, value in manifest.items() if there[key] != value), None)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: choose another --out") from None
    if other:
        raise ValueError(f"{out} was begun with other {other.replace('_sha256', '')}: choose another --out")


def encode(image, extension, *options):
    """(H, W, 3 or 4) uint8, RGB or RGBA -> the bytes of a file"""
    order = [2, 1, 0, 3][: image.shape[2]]  # OpenCV keeps blue first
    return cv2.imencode(extension, image[..., order], options)[1].tobytes()


def write_shard(out, number, pairs, rows, rejected):
    """A shard of pairs [(number, {extension: bytes})], its preview of rows of pictures, and last its .json: how many
    are kept, and how many rejected, a Counter of reasons. Byte for byte the same for the same pairs."""
    path = name_shard(out, number, "tar")
    for leftover in out.glob(f".{path.name}.*"):  # of a run that was killed: nobody else works on this shard
        leftover.unlink(missing_ok=True)
    if pairs:
        with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for k, files in pairs:
                for extension, data in files.items():
                    member = tarfile.TarInfo(f"{k:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if rows:
        names = ("reference", "target", "flow", "affine", "motion")
        top = labelled([Image.fromarray(picture) for picture in rows[0]], names, gap=0)
        sheet = Image.fromarray(np.concatenate([np.asarray(top), *[np.concatenate(row, 1) for row in rows[1:]]]))
        with atomic_write(name_shard(out, number, "png")) as temporary:
            sheet.save(temporary, "PNG")
    write_json(name_shard(out, number, "json"), {"kept": len(pairs), "rejected": rejected})


def add_up(out, count):
    """What the .json of the finished shards say: how many of `count` are done, a Counter of the pairs."""
    done, counts = 0, Counter()
    for number in range(count):
        path = name_shard(out, number, "json")
        if path.exists():
            kept, rejected = read_counts(path)
            counts += Counter(rejected, kept=kept)
            done += 1
    return done, counts


def summarize(counts):
    """A Counter of pairs -> '16 kept of 30 (rejected: holes 8, still 6)'"""
    rejected = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()) if reason != "kept")
    return f"{counts['kept']} kept of {counts.total()}" + (f" (rejected: {rejected})" if rejected else "")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_counts(path):
    """The .json of a shard -> pairs kept, {reason: pairs rejected}"""
    try:
        found = json.loads(path.read_bytes())
        return int(found["kept"]), dict(found.get("rejected", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, and let data.py make its shard again") from None


def find_shards(path):
    """A folder's shards that are done and hold any pairs -> [(path, pairs)]. ValueError: none, or a damaged .json"""
    found = []
    for done in sorted(Path(path).glob("pairs-*.json")):
        kept, _ = read_counts(done)
        if kept:
            found.append((done.with_suffix(".tar"), kept))
    if not found:
        raise ValueError(f"{path} holds no finished shards: python data.py VIDEO_OR_FOLDER ... --out {path}")
    return found


@functools.lru_cache(maxsize=512)
def read_index(path):
    """A shard -> [{extension: (offset, bytes)}] of its pairs, in order. ValueError if it is damaged."""
    pairs = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                pairs.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete its .json, and let data.py make it again") from None
    return list(pairs.values())


def read_pictures(path, i, extensions):
    """These pictures of pair number i in a shard -> [(3 or 4, H, W) uint8]. ValueError if it is damaged."""
    try:
        files = read_index(path)[i]
        pictures = []
        with open(path, "rb") as shard:
            for extension in extensions:
                offset, size = files[extension]
                shard.seek(offset)
                picture = cv2.imdecode(np.frombuffer(shard.read(size), np.uint8), cv2.IMREAD_UNCHANGED)
                order = (2, 1, 0, 3)[: picture.shape[2]]  # as in `encode`
                pictures.append(torch.from_numpy(np.stack([picture[..., c] for c in order])))
    except (IndexError, KeyError, AttributeError, cv2.error):
        raise ValueError(f"{path} is damaged: pair {i} cannot be read. Delete its .json and make it again") from None
    return pictures
