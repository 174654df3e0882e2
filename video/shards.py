"""Work cut into shards, for data.py: the list of it, the processes that do it in order, and the files that they leave.

What a shard holds, and when it is done, is in data.py's docstring. Every file is there whole or not at all.
"""

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

import cv2
import numpy as np
import torch
from PIL import Image

from common.files import atomic_write
from common.pictures import labelled


def work(recipe, clips):
    """The list of work, as ranges of numbers, one per shard. Number k is pair k % pairs of clip k // pairs.

    A shard holds up to 256 pairs, some 150 MB, but fewer where there would be less than 64 shards, for many machines.
    """
    total = len(clips) * recipe.pairs
    per_shard = min(256, max(8, total // 64))
    return [range(k, min(k + per_shard, total)) for k in range(0, total, per_shard)]


def write_shard(path, samples):
    """[(number, {extension: bytes})] -> a .tar, byte for byte the same for the same samples; whole or not at all."""
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a run that was killed: nobody else works on this shard
        leftover.unlink(missing_ok=True)
    with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
        for k, files in samples:
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{k:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_preview(path, rows):
    """Rows of pictures as a PNG sheet, with names over the first."""
    names = ("reference", "target", "flow", "affine", "motion")
    top = labelled([Image.fromarray(picture) for picture in rows[0]], names, gap=0)
    sheet = Image.fromarray(np.concatenate([np.asarray(top), *[np.concatenate(row, 1) for row in rows[1:]]]))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def start_worker():
    """In a process of its own: one thread, and gone when the parent is, even by kill -9."""
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, too, and ends the others
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def quiet():
    """One thread; and decoders keep quiet about broken videos, which are reported in one line of ours."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"


def in_order(make, tasks, workers):
    """make(*task) for every task, in order, in `workers` processes, which run no further ahead than a few each."""
    if workers == 1:
        threads = torch.get_num_threads()
        quiet()
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


def totals_of(out, shards):
    """What the finished shards' files say, added up: (shards done, Counter). ValueError if one is damaged."""
    done, counts = 0, Counter()
    for path in (out / f"pairs-{s:06d}.json" for s in range(shards)):
        if path.exists():
            try:
                told = json.loads(path.read_bytes())
                counts += Counter({"kept": told["kept"], **told["rejected"]})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged: delete it, and its shard is made again") from None
            done += 1
    return done, counts


def summary(counts):
    rejected = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()) if reason != "kept")
    return f"{counts['kept']} kept of {counts.total()}" + (f" (rejected: {rejected})" if rejected else "")
