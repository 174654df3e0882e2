"""kill -9 at random moments: what goes on afterwards ends where an undisturbed run does, and nothing broken is left.

    python -m tests.robust.kill                              10 kills of each program, a few minutes
    python -m tests.robust.kill train data --kills 100 --seed 7

Half of the moments are drawn over the whole run, half fall into the writing of a file. The moments are drawn from the
seed, but what a program does at a moment depends on the machine.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from common.files import read_json
from common.run_state import list_states
from tests.runs import GRADIENT, MEADOW, ROOT, film, same_picture
from tests.training import arguments, write_stable


def kill_train(folder, kills, rng):
    """The states, the model and the pictures are the same, byte for byte."""
    words = ["--steps", 40, "--save-every", 2, "--warmup", 3]
    argv = ["train.py", *arguments(write_stable(folder / "stable"), folder / "OUT", *words)]

    def go_on(out):
        resume = ["--resume"] if list_states(out, "mfx") else []
        return [out if word == str(folder / "OUT") else word for word in argv] + resume

    return kill_often(folder, go_on, kills, rng, equal_bytes)


def kill_data(folder, kills, rng, workers=1):
    """The shards are the same, byte for byte, and no worker outlives its parent."""
    for seed in range(6):
        film(folder / f"{seed}.mp4", seed=seed)
    clips = sorted(folder.glob("*.mp4"))

    def go_on(out):
        return ["data.py", *clips, "--out", out, "--size", 64, "--pairs", 8, "--preview", "--workers", workers]

    return kill_often(folder, go_on, kills, rng, equal_bytes)


def kill_data_of_two(folder, kills, rng):
    return kill_data(folder, kills, rng, workers=2)


def kill_sample(folder, kills, rng):
    """The pictures are the same: those of another process, to one grey level."""

    def go_on(out):
        out.mkdir(exist_ok=True)
        files = ["--out", out / "r.png", "--sheet", out / "sheet.png", "--steps-strip", out / "strip.png"]
        return ["sample.py", "--image", MEADOW, "--change-map", GRADIENT, "--prompt", "snow", "--steps", 2, *files]

    return kill_often(folder, go_on, kills, rng, equal_pictures)


CAMPAIGNS = {"train": kill_train, "data": kill_data, "data2": kill_data_of_two, "sample": kill_sample}

# ---------------------------------------------------------------------------------------------------------------------
# Killing


def kill_often(folder, go_on, kills, rng, compare):
    """Run go_on(out), the command line that starts or goes on, once undisturbed, and once killed so often. -> what was
    seen at each kill. AssertionError if anything is broken, left over or different."""
    whole, out = folder / "whole", folder / "killed"
    begin = time.perf_counter()
    finish(start(go_on(whole)))
    seconds = time.perf_counter() - begin
    seen = []
    while len(seen) < kills:
        process = start(go_on(out))
        in_write = rng.random() < 0.5
        moment = time.perf_counter() + rng.uniform(0, seconds)
        while process.poll() is None and time.perf_counter() < moment + in_write * seconds:
            if in_write and time.perf_counter() > moment - seconds / 2 and find_leftovers(out, process.pid):
                time.sleep(rng.choice([0, 0, 0.001, 0.003]))
                break
            time.sleep(0.0005)
        workers = list_children(process.pid)
        process.kill()
        status = process.wait()
        assert status in (0, -signal.SIGKILL), f"{process.args} failed: see above"
        wait_until_gone(workers)
        check_whole(out)
        if status == 0:  # it had finished: the next one begins anew
            compare(whole, out)
            remove(out)
        else:
            seen.append(f"{'in a write' if in_write else 'at a time'}: {len(list_files(out))} files, "
                        f"left over {[path.name for path in find_leftovers(out)]}")
    finish(start(go_on(out)))
    compare(whole, out)
    assert not find_leftovers(out), find_leftovers(out)
    return seen


def start(argv):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    device = [] if argv[0] == "data.py" or "--device" in argv else ["--device", "cpu"]
    return subprocess.Popen([sys.executable, *map(str, [*argv, *device])], cwd=ROOT, env=env,
                            stdout=subprocess.DEVNULL)


def finish(process):
    assert process.wait() == 0, process.args


def list_children(process):
    """-> the processes that it has started, as far as Linux tells"""
    path = Path(f"/proc/{process}/task/{process}/children")
    with contextlib.suppress(OSError):
        return [int(child) for child in path.read_text().split()]
    return []


def wait_until_gone(processes):
    end = time.time() + 20
    while any(Path(f"/proc/{n}").exists() for n in processes):
        assert time.time() < end, "a worker outlives its parent"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def list_files(out):
    """-> {name: path} of the files under their final names"""
    return {str(p.relative_to(out)): p for p in sorted(out.rglob("*")) if p.is_file() and p.name[0] != "."}


def find_leftovers(out, process=""):
    """The temporaries, of that process or all"""
    return [path for path in out.rglob(".*") if path.name.endswith(str(process))]


def remove(out):
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def check_whole(out):
    """Every file under a final name can be read to its end."""
    for path in list_files(out).values():
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                assert [tar.extractfile(member).read() for member in tar]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert [file.get_tensor(name) for name in file.keys()]
        else:
            raise AssertionError(f"{path}: what is this?")


def equal_bytes(whole, out):
    a, b = list_files(whole), list_files(out)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    other = [name for name in a if a[name].read_bytes() != b[name].read_bytes()]
    assert not other, other


def equal_pictures(whole, out):
    a, b = list_files(whole), list_files(out)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert same_picture(*(np.asarray(Image.open(x[name]).convert("RGB"), int) for x in (a, b))), name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help=", ".join(CAMPAIGNS))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.programs or CAMPAIGNS:
        with tempfile.TemporaryDirectory() as folder:
            seen = CAMPAIGNS[name](Path(folder), args.kills, random.Random(f"{name} {args.seed}"))
        print(f"{name}: {len(seen)} kills, nothing broken, nothing lost", *seen, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
