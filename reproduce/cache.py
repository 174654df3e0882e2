"""What was measured before, kept in OUT/cache/. An item runs again if code, options or its weights have changed."""

import functools
import hashlib
import json
from pathlib import Path

from checkpoints.magicfixup import INDEX
from common.files import read_json, write_json
from reproduce.lab import Outcome
from reproduce.report import Entry

ROOT = Path(__file__).parent.parent


@functools.cache
def digest_code():
    """Of all the project's own .py files that an item may run: whatever changes in them, everything runs again."""
    others = "tests", "bench", "course"
    folders = [d for d in ROOT.iterdir() if (d / "__init__.py").is_file() and d.name not in others]
    files = [*ROOT.glob("*.py"), *(f for d in folders for f in d.rglob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()


def fingerprint(path):
    """Names, sizes and times of a file, or of all files in a folder, as text. With the autoencoders that Magic Fixups
    in it lean on elsewhere. "none" where nothing is."""
    if path is None or not Path(path).exists():
        return "none"
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for index in [f for f in files if f.name == INDEX]:
        files += sorted((index.parent / str(read_json(index).get("vae"))).rglob("*"))
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def key_of(item, options):
    """Of what decides an item's results besides the code: the weights that it needs, the other options {name: value}"""
    mine = {n: v for n, v in options.items() if n in item.needs or not n.endswith("weights")}
    return hashlib.sha256(json.dumps([item.name, sorted(mine.items())]).encode()).hexdigest()


def write(item, key, outcome, seconds, out):
    kept = {"key": key, "code": digest_code(), "seconds": seconds} | outcome._asdict()
    write_json(out / "cache" / f"{item.name}.json", kept)


def read(item, key, out, quick=False):
    """What was found when the item was run before -> a report.Entry, or None."""
    try:
        found = json.loads((out / "cache" / f"{item.name}.json").read_text(encoding="utf-8"))
        outcome = Outcome(**{name: found[name] for name in Outcome._fields})
        if found["key"] != key or not all((out / name).is_file() for name, _ in outcome.pictures):
            return None
        return Entry(item, outcome, found["seconds"], out, quick, found["code"] == digest_code())
    except (OSError, ValueError, KeyError, TypeError):
        return None
