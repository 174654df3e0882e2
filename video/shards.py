"""The folder of shards that data.py writes: its list of work, the processes that do it, the files, and reading them.

data.py's docstring says what a shard holds, and when it is done. Every file is there whole or not at all.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import tarfile
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from common.cli import tell
from common.files import atomic_write, check_writable, write_json
from common.interrupts import kept_from_children
from common.pictures import labelled

ANY_NAME = "utf-8", "surrogateescape"  # a file's name need not be UTF-8
MOST = 1_000_000  # pairs in a shard, whoever wrote it

# ---------------------------------------------------------------------------------------------------------------------
# The work


def list_work(*runs):
    """How many pairs the first run has, and each that added clips -> a list of ranges of numbers, one per shard.

    A shard holds up to 256 pairs, some 150 MB; fewer, where there would be less than 64 shards for many machines.
    """
    work, first = [], 0
    for pairs in runs:
        per_shard = min(256, max(8, pairs // 64))
        end = first + pairs
        work += [range(k, min(k + per_shard, end)) for k in range(first, end, per_shard)]
        first = end
    return work


def order_clips(out, clips, known):
    """Clips [(name, path)] as they are found -> those in the order of known, names, and then the new ones.

    ValueError: one that is known is missing.
    """
    left, old, new = Counter(known), {}, []
    for clip in clips:
        name, _ = clip
        if left[name]:
            left[name] -= 1
            old.setdefault(name, []).append(clip)
        else:
            new.append(clip)
    if left.total():
        missing = next(left.elements())
        raise ValueError(f"{out} was begun with other clips, as {missing}: choose another --out, or give all of them")
    return [old[name].pop(0) for name in known] + new


def run_in_order(make, tasks, workers, lose):
    """make(*task) for every task, in order, in `workers` processes, which run no further ahead than a few each.

    lose  (*task) -> the result of a task that a process dies of. BrokenProcessPool: they die of two tasks in a row
    """
    if workers == 1:
        threads = torch.get_num_threads()
        quieten()
        try:
            yield from itertools.starmap(make, tasks)
        finally:
            torch.set_num_threads(threads)
        return
    tasks = iter(tasks)
    while True:
        ahead = deque()
        try:
            yield from run_ahead(make, tasks, workers, ahead)
            return
        except BrokenProcessPool:  # the results of all tasks that were ahead are gone
            again = deque(task for task, _ in ahead)

        # One after the other, in one process: if it dies, then of the first task that is not done.
        died = False
        while again:
            try:
                for result in run_ahead(make, list(again), 1, deque()):
                    died = False
                    again.popleft()
                    yield result
            except BrokenProcessPool:
                if died:
                    raise
                died = True
                yield lose(*again.popleft())


def run_ahead(make, tasks, workers, ahead):
    """The same, and ahead fills with (task, future) of those whose results are not taken yet."""
    with kept_from_children():  # multiprocessing's own helper
        pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (workers,))

    def take():
        result = ahead[0][1].result()
        ahead.popleft()
        return result

    with pool:
        try:
            for task in tasks:
                ahead.append((task, None))
                with kept_from_children():  # submitting starts a worker, which imports for seconds
                    ahead[-1] = task, pool.submit(make, *task)
                if len(ahead) > 4 * workers:
                    yield take()
            while ahead:
                yield take()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker(workers):
    """In a process of its own: one thread, a GPU in turn, and gone when the parent is, even by kill -9."""
    quieten()
    number = int(current_process().name.rpartition("-")[2])  # SpawnProcess-3 is the third
    os.environ["LOCAL_RANK"] = str(int(os.environ.get("LOCAL_RANK", 0)) + (number - 1) % workers)
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


def begin(out, clips, recipe, networks):
    """Start the folder of shards, go on with it, or add clips to one that is finished.

    clips     [(name, path)] as they are found. Those that are added come last in the order of work: finished shards
              stay as they are
    recipe    {name: value}; networks, {name: value}, or {}
      -> manifest.json, the clips in the order of work, the work as `list_work`
    ValueError: it was begun with other words, or is no such folder.
    """
    check_writable(out)
    path = out / "manifest.json"
    old, known, runs = {}, [], []
    if path.exists():
        old, known, runs = read_manifest(path, clips)
        for key, value in (("recipe", recipe), ("networks", networks)):
            if old.get(key, {}) != value:
                raise ValueError(f"{out} was begun with other {key}: choose another --out")
    elif any(out.glob("*.tar")):
        raise ValueError(f"{out} holds shards, but no manifest.json: choose another --out")

    clips = order_clips(out, clips, known)
    added = len(clips) - len(known)
    if added and old and "totals" not in old:
        raise ValueError(f"{out} is not finished, and {clips[-1][0]} is a new clip: finish it first without new ones")
    if added:
        runs.append(added)
    work = list_work(*[n * recipe["pairs"] for n in runs])
    names = [name for name, _ in clips]
    manifest = {"recipe": recipe, "clips": len(clips), "clips_sha256": digest_names(names), "shards": len(work)}
    if networks:
        manifest["networks"] = networks
    manifest |= {"runs": runs, "names": names}
    if added:
        new = not out.exists()
        try:
            write_json(path, manifest)
        except OSError:
            if new and out.exists():
                out.rmdir()
            raise
        if old:
            tell(f"{out}: {added} clips are added to the {len(known)} that are there")
    return manifest, clips, work


def read_manifest(path, clips):
    """-> what it holds, the names of its clips in order, how many of these came with each run. ValueError: damaged"""
    try:
        old = json.loads(path.read_bytes())
        runs = list(old.get("runs", [old["clips"]]))
        first = [name for name, _ in clips[: sum(runs)]]  # an older manifest has no names: its clips come first
        known = list(old.get("names", first))
        if digest_names(known) == old["clips_sha256"] and len(known) == sum(runs):
            return old, known, runs
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        old = {"names": []}
    what = f"{path} is damaged" if "names" in old else f"{path.parent} was begun with other clips"
    raise ValueError(f"{what}: choose another --out")


def digest_names(names):
    return hashlib.sha256("\n".join(names).encode(*ANY_NAME)).hexdigest()


def encode(image, extension, *options):
    """(H, W, 3 or 4) uint8, RGB or RGBA -> the bytes of a file"""
    order = [2, 1, 0, 3][: image.shape[2]]  # OpenCV keeps blue first
    return cv2.imencode(extension, image[..., order], options)[1].tobytes()


def write_shard(out, number, pairs, rows, rejected):
    """A shard of pairs [(number, {extension: bytes})], its preview of rows of pictures, and last its .json: how many
    are kept, and how many rejected, a Counter of reasons. Byte for byte the same for the same pairs."""
    if pairs:
        with atomic_write(name_shard(out, number, "tar")) as temporary, tarfile.open(temporary, "w") as tar:
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
        kept = int(found["kept"])
        if not 0 <= kept <= MOST:
            raise ValueError
        return kept, {reason: int(n) for reason, n in found.get("rejected", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
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
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                if not member.isreg() or not 0 <= member.size <= end - member.offset_data:
                    raise ValueError(f"{member.name} is no file")
                pairs.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, EOFError, ArithmeticError, LookupError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete its .json, and let data.py make it again") from None
    return list(pairs.values())


def read_pictures(path, i, extensions):
    """These pictures of pair number i in a shard -> [(3 or 4, H, W) uint8], of one size; PNGs have 4 channels.

    ValueError if it is damaged.
    """
    try:
        files = read_index(path)[i]
        pictures = []
        with open(path, "rb") as shard:
            for extension in extensions:
                offset, size = files[extension]
                shard.seek(offset)
                picture = cv2.imdecode(np.frombuffer(shard.read(size), np.uint8), cv2.IMREAD_UNCHANGED)
                order = (2, 1, 0, 3)[: 4 if extension.endswith("png") else 3]  # as in `encode`
                if picture.dtype != np.uint8 or picture.shape[2] != len(order):
                    raise ValueError
                pictures.append(torch.from_numpy(np.stack([picture[..., c] for c in order])))
        if len({picture.shape[1:] for picture in pictures}) > 1:
            raise ValueError
    except (IndexError, KeyError, AttributeError, ValueError, cv2.error):
        raise ValueError(f"{path} is damaged: pair {i} cannot be read. Delete its .json and make it again") from None
    return pictures
