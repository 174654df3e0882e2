"""The rules of the house, held: which way imports go, what stands in front, and which packages run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("common", "kernels", "checkpoints", "models", "networks", "video", "editing", "toy", "reproduce", "bench",
           "course")
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "cv2", "tqdm"}
CARD = {"mfx", "diffdiff", "unet", "vae", "warp", "data", "train", "sample"}

# A file imports from its own row and the rows above it.
ROWS = (
    ("common", "kernels"),
    ("unet", "vae", "clip", "diffusion", "samplers", "warp", "networks"),
    ("checkpoints", "collage", "diffdiff", "models"),
    ("sd",),
    ("mfx",),
    ("video", "editing", "toy"),
    ("data",),
    ("train", "sample", "app"),
    ("reproduce", "bench", "course"),
)
HEIGHT = {name: i for i, row in enumerate(ROWS) for name in row}


def list_files():
    front = sorted(ROOT.glob("*.py"))
    return front + [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]


def owner(path):
    """The file in front, or the folder"""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def list_imports(path):
    """-> [(line, first name of a module)]"""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def test_every_file_has_a_place():
    assert {owner(path) for path in list_files()} <= set(HEIGHT)
    top = {path.stem for path in ROOT.glob("*.py")}
    assert CARD <= top and len(top) <= 14
    folders = {p.parent.name for p in ROOT.glob("*/*.py")} - {"tests"}
    assert folders <= set(FOLDERS)


@pytest.mark.parametrize("path", list_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    mine = owner(path)
    for line, name in list_imports(path):
        if name in HEIGHT:
            assert HEIGHT[name] <= HEIGHT[mine], f"line {line}: {mine} must not import {name}"
        elif name not in sys.stdlib_module_names and mine != "bench":  # bench measures beside peers
            assert name in PACKAGES, f"line {line}: {name} is no run-time package"
    if mine in ("unet", "vae", "clip", "diffusion"):
        assert not {name for _, name in list_imports(path)} & set(HEIGHT), "a network imports nothing of ours"


def test_programs_tell():
    """print fails with a full log."""
    for path in [p for p in list_files() if owner(p) not in ("common", "reproduce", "bench", "course")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Name) and node.id == "print"), f"{path}, line {node.lineno}: use tell"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_a_file_in_front_fits_on_a_projector(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
