"""Checkpoint files -> {name: tensor}, without running anything that is in them."""

import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.files import read_json

PICKLES = ".ckpt", ".pt", ".pth", ".bin"


def read_tensors(path):
    """A .safetensors file or a pickled state dict -> {name: tensor}, on the CPU, memory-mapped.

    FileNotFoundError if there is no file, ValueError if it is empty, damaged, refused or no
    checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: download it again")
    if path.suffix in PICKLES:
        return read_pickle(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a checkpoint: expected a folder, .safetensors, .ckpt, "
                         ".pt, .pth or .bin")
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as e:
        reason = f"{path} is not a whole safetensors file ({e}): download it again"
        raise ValueError(reason) from None


# --------------------------------------------------------------------------------------------------
# Pickles
#
# A pickle is a program, so nothing of it is executed: names of known training frameworks become
# `Inert`, any other name but a tensor's is refused.

BYSTANDERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy",
              "collections", "typing")


class Inert(dict):
    """Stands for what a training framework left in a pickle: it takes anything, does nothing."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, _):
        pass


def read_pickle(path):
    """What `torch.save` wrote, a state dict or one in "state_dict" -> {name: tensor}."""
    zipped = zipfile.is_zipfile(path)  # torch.save's format since 2020, the one that can be mapped
    refused = []
    try:
        # What is in the file by name besides tensors; the older format says it only as it fails.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        refused = [name for name in names if name.split(".")[0] not in BYSTANDERS]
        if not refused:
            with torch.serialization.safe_globals([(Inert, name) for name in names]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # a damaged file can fail in any way
        refused = re.findall(r"GLOBAL (\S+)", str(e))
        if not refused:
            reason = str(e).splitlines()[0]
            raise ValueError(f"{path} is damaged, or no checkpoint ({reason})") from None
    if refused:
        raise ValueError(f"{path} is refused: a pickle that refers to {', '.join(refused[:3])} "
                         "could run code. Get the .safetensors version, or convert it on a machine "
                         "where you trust it")

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and torch.is_tensor(value):
            tensors[name] = value
    if not tensors:
        raise ValueError(f"{path} is not a checkpoint: there are no tensors in it")
    return tensors


# --------------------------------------------------------------------------------------------------
# Folders, and whether tensors fit


def read_folder(folder):
    """The weights in one part's folder, whole or in shards, fp32 or fp16 -> {name: tensor}."""
    folder = Path(folder)
    for kind in ("safetensors", "bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for variant in ("", ".fp16"):
                file = folder / f"{stem}{variant}.{kind}"
                if file.is_file():
                    return read_tensors(file)
                for index in (f"{stem}.{kind}.index{variant}.json",
                              f"{stem}{variant}.{kind}.index.json"):
                    if (folder / index).is_file():
                        return read_shards(folder / index)
    raise FileNotFoundError(f"there are no weights in {folder}: expected "
                            "diffusion_pytorch_model.safetensors, model.safetensors, or the same "
                            "as .bin")


def read_shards(index):
    """The index of files that share the tensors of one network -> {name: tensor}."""
    files = read_json(index).get("weight_map")
    if not (isinstance(files, dict) and all(isinstance(file, str) for file in files.values())):
        raise ValueError(f"{index} does not say where each tensor is: copy it again")
    tensors = {}
    for file in sorted(set(files.values())):
        tensors |= read_tensors(index.parent / file)
    return tensors


def describe_misfits(model, shapes):
    """What keeps tensors of these {name: shape} from being the model's, in words; "" if nothing."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    misfits = {
        "missing": [n for n in expected if n not in shapes],
        "unexpected": [n for n in shapes if n not in expected],
        "misshapen": [f"{n} {shapes[n]} instead of {shape}" for n, shape in expected.items()
                      if shapes.get(n, shape) != shape],
    }
    problems = []
    for kind, names in misfits.items():
        if names:
            problems.append(f"{len(names)} {kind} tensors, e.g. {', '.join(names[:3])}")
    return "; ".join(problems)
