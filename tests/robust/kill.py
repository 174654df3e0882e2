"""kill -9 at random moments, full disks, two at once: what goes on afterwards ends where an undisturbed run does, and
nothing broken is left.

    python -m tests.robust.kill                              10 kills of each program, a few minutes
    python -m tests.robust.kill train data --times 100 --seed 7
    python -m tests.robust.kill --how full

Half of the moments are drawn over the whole run, half fall into the writing of a file. The moments are drawn from the
seed, but what a program does at a moment depends on the machine. A disk is full for files beyond a drawn size.
"""

import argparse
import contextlib
import math
import os
import random
import resource
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

# Each program: a function of a folder for its input -> go_on(out), the command line that starts or goes on; and how
# two results are compared.


def train(folder):
    """The states, the model and the pictures are the same, byte for byte."""
    words = ["--steps", 40, "--save-every", 2, "--warmup", 3]
    argv = ["train.py", *arguments(write_stable(folder / "stable"), folder / "OUT", *words)]

    def go_on(out):
        resume = ["--resume"] if list_states(out, "mfx") else []
        return [out if word == str(folder / "OUT") else word for word in argv] + resume

    return go_on, equal_bytes


def data(folder, workers=1):
    """The shards are the same, byte for byte, and no worker outlives its parent."""
    for seed in range(6):
        film(folder / f"{seed}.mp4", seed=seed)
    clips = sorted(folder.glob("*.mp4"))

    def go_on(out):
        return ["data.py", *clips, "--out", out, "--size", 64, "--pairs", 8, "--preview", "--workers", workers]

    return go_on, equal_bytes


def data2(folder):
    return data(folder, workers=2)


def sample(folder):
    """The pictures are the same: those of another process, to one grey level."""

    def go_on(out):
        out.mkdir(exist_ok=True)
        files = ["--out", out / "r.png", "--sheet", out / "sheet.png", "--steps-strip", out / "strip.png"]
        return ["sample.py", "--image", MEADOW, "--change-map", GRADIENT, "--prompt", "snow", "--steps", 2, *files]

    return go_on, equal_pictures


PROGRAMS = {program.__name__: program for program in (train, data, data2, sample)}

# ---------------------------------------------------------------------------------------------------------------------
# What is done to them: once undisturbed, and once disturbed so many times. -> what was seen each time. AssertionError
# if anything is broken, left over or different.


def kill(folder, program, times, rng):
    go_on, compare = program(folder)
    whole, out = folder / "whole", folder / "killed"
    begin = time.perf_counter()
    finish(start(go_on(whole)))
    seconds = time.perf_counter() - begin
    seen = []
    while len(seen) < times:
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


def fill_disk(folder, program, times, rng):
    """One line of error, and all that was there before is whole."""
    go_on, compare = program(folder)
    whole, out = folder / "whole", folder / "full"
    finish(start(go_on(whole)))
    sizes = sorted(path.stat().st_size for path in list_files(whole).values())
    seen = []
    while len(seen) < times:
        most = rng.randrange(rng.choice(sizes))
        process = start(go_on(out), most)
        said = process.communicate()[1].decode().replace("\r", "\n").strip().splitlines()
        check_whole(out)
        assert not find_leftovers(out), find_leftovers(out)
        if process.returncode == 0:  # all that was still to be written is small
            compare(whole, out)
        else:
            assert process.returncode == 2 and ": error: " in said[-1], said
            assert not any("Traceback" in line for line in said), said
            seen.append(f"files of {most} bytes: {said[-1]}")
        if process.returncode == 0 or rng.random() < 0.5:
            remove(out)
    finish(start(go_on(out)))
    compare(whole, out)
    return seen


def run_two(folder, program, times, rng):
    """One of them does all of it; the other does the same, or is refused in one line."""
    go_on, compare = program(folder)
    whole = folder / "whole"
    finish(start(go_on(whole)))
    seen = []
    for i in range(times):
        out = folder / f"two{i}"
        argv = go_on(out)
        first = start(argv, math.inf)
        time.sleep(rng.choice([0, 0.1, 2]))
        second = start(argv, math.inf)
        said = [process.communicate()[1].decode().replace("\r", "\n").strip() for process in (first, second)]
        codes = sorted([first.returncode, second.returncode])
        assert codes in ([0, 0], [0, 2]) and not any("Traceback" in text for text in said), said
        compare(whole, out)
        assert not find_leftovers(out), find_leftovers(out)
        seen.append(f"status {codes}: {[text.splitlines()[-1] for text in said if 'error: ' in text]}")
    return seen


HOW = {"kill": kill, "full": fill_disk, "two": run_two}


def start(argv, most=None):
    """A process. `most`: files can have so many bytes, and what it says can be read."""
    limited = {} if most is None else {"stderr": subprocess.PIPE}
    if most not in (None, math.inf):  # where a file reaches it, writing fails as on a full disk
        limited["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    device = [] if argv[0] == "data.py" or "--device" in argv else ["--device", "cpu"]
    return subprocess.Popen([sys.executable, *map(str, [*argv, *device])], cwd=ROOT, env=env,
                            stdout=subprocess.DEVNULL, **limited)


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


# --- Looking --------------------------------------------------------------------------------------


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
    parser.add_argument("programs", nargs="*", help=", ".join(PROGRAMS))
    parser.add_argument("--how", choices=HOW, default="kill")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.programs or PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            seen = HOW[args.how](Path(folder), PROGRAMS[name], args.times, random.Random(f"{name} {args.seed}"))
        print(f"{name}, {args.how}: {len(seen)} times, nothing broken, nothing lost", *seen, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
