"""Files that are there whole or not at all, JSON, and what safetensors files say of themselves."""

import contextlib
import fnmatch
import glob
import json
import os
import platform
import re
import sys
import time
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # processes of many machines may write to one folder
PATIENCE = 8.0  # seconds until a folder that another process has is given up


def read_json(path, default=None):
    """-> the object {name: value} in that file; `default`, where given, if there is no such file.

    FileNotFoundError, or ValueError if the file holds anything else.
    """
    if default is not None and not path.is_file():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e}): copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it should hold {{...}}, not a "
                         f"{type(found).__name__}. Copy it again")
    return found


def read_metadata(path):
    """What a safetensors file says of itself: {name: text}; of any other, or none, nothing"""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        return file.metadata() or {}
    return {}


def check_writable(out):
    """ValueError if `out` is no folder that is there, or can be made, for files to be written to."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{out} cannot be written: is {there} a folder, and yours? Choose another --out")


@contextlib.contextmanager
def lock_folder(folder):
    """Make a folder, and keep other processes that ask for it out. ValueError if one has it.

    A process that ends, even by kill -9, leaves it; its workers a few seconds later. torchrun's are one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):  # a file system that knows no locks
            while not try_lock(held):
                if time.monotonic() > end:
                    raise ValueError(f"another program is writing to {folder}: wait for it, or choose another folder")
                time.sleep(0.1)
        yield
    finally:
        os.close(held)


def try_lock(held):
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def atomic_write(path):
    """A name to write to, which becomes `path` if nothing goes wrong. What a killed process left of it is deleted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the disk has it before it has the name, if the power fails
        os.replace(temporary, path)  # where the old file is mapped, the map keeps the old contents
    except SafetensorError as e:
        raise OSError(f"{path} cannot be written: {e}") from None
    except OSError as e:
        if e.errno is None or e.filename:  # told already, here or where a file was opened
            raise
        raise OSError(f"{path} cannot be written: {e.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder, pattern):
    """Delete the temporaries of `atomic_write`, for names like this, of processes of this machine that have ended."""
    for path in folder.glob(f".{pattern}.*"):
        name, owner = path.name.rsplit(".", 1)
        ours = fnmatch.fnmatchcase(name.removesuffix(f".{HOST}"), f".{pattern}")  # earlier versions wrote no HOST
        if ours and re.fullmatch("[0-9]{1,9}", owner) and not is_running(int(owner)):
            path.unlink(missing_ok=True)


def is_running(process):
    if sys.platform == "win32":  # where os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def write_json(path, content):
    with atomic_write(path) as out:
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
