"""What was measured before, kept in OUT/cache/. An item runs again if code, options or its weights have changed."""

import functools
import hashlib
import json
from pathlib import Path

from checkpoints.magicfixup import INDEX
from common.files import read_json, write_json
from reproduce.lab import Outcome

ROOT = Path(__file__).parent.parent


@functools.cache
def digest_code():
    """Of all the project's own .py files but tests and bench: whatever changes in them, everything runs again."""
    folders = [d for d in ROOT.iterdir() if (d / "__init__.py").is_file() and d.name not in ("tests", "bench")]
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
    """Of all that decides an item's results: code, the weights that it needs, the other options {name: value}."""
    mine = {n: v for n, v in options.items() if n in item.needs or not n.endswith("weights")}
    parts = [item.name, digest_code(), sorted(mine.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write(item, key, outcome, seconds, out):
    """-> (Outcome, seconds) as `read` gives them."""
    write_json(out / "cache" / f"{item.name}.json", {"key": key, "seconds": seconds} | outcome._asdict())
    return read(item, key, out)


def read(item, key, out):
    """What was found when the item was run before -> (Outcome, seconds), or None."""
    try:
        found = json.loads((out / "cache" / f"{item.name}.json").read_text(encoding="utf-8"))
        outcome = Outcome(**{name: found[name] for name in Outcome._fields})
        if found["key"] != key or not all((out / name).is_file() for name, _ in outcome.pictures):
            return None
        return outcome, found["seconds"]
    except (OSError, ValueError, KeyError):
        return None
