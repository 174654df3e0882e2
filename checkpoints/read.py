"""Checkpoint files: reading them without running anything in them."""

import contextlib
import gc
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.files import read_json


class Inert(dict):
    """Stands for whatever a training framework left in a pickle: it takes any arguments and state, and does nothing."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, _):
        pass


BYSTANDERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "collections", "typing")


def read_tensors(path):
    """A .safetensors file or a pickled state dict -> {name: tensor}, on the CPU, mapped into memory.

    Nothing in a pickle is executed: names of known training frameworks become `Inert`, any other name but a tensor's
    is refused. FileNotFoundError if there is no file, ValueError if it is empty, damaged, refused or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: download it again")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as e:
            raise ValueError(f"{path} is not a whole safetensors file ({e}): download it again") from None
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} is not a checkpoint: expected a folder, .safetensors, .ckpt, .pt, .pth or .bin")
    zipped = zipfile.is_zipfile(path)  # torch.save's format since 2020, the one that can be mapped
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        refused = [name for name in names if name.split(".")[0] not in BYSTANDERS]
        if not refused:
            with torch.serialization.safe_globals([(Inert, name) for name in names]):
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # a damaged file can fail in any way
        refused = re.findall(r"GLOBAL (\S+)", str(e))
        if not refused:
            raise ValueError(f"{path} is damaged, or no checkpoint ({str(e).splitlines()[0]})") from None
    if refused:
        raise ValueError(f"{path} is refused: a pickle that refers to {', '.join(refused[:3])} could run code. Get the "
                         ".safetensors version, or convert it on a machine where you trust it")
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    named = tensors.items() if isinstance(tensors, dict) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{path} is not a checkpoint: there are no tensors in it")
    return tensors


def describe_misfits(model, shapes):
    """What keeps tensors of these {name: shape} from being the model's, in words with a few names; "" if nothing."""
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": [n for n in want if n not in shapes],
        "unexpected": [n for n in shapes if n not in want],
        "misshapen": [f"{n} {shapes[n]} instead of {s}" for n, s in want.items() if shapes.get(n, s) != s],
    }
    return "; ".join(f"{len(n)} {kind} tensors, e.g. {', '.join(n[:3])}" for kind, n in problems.items() if n)


def read_folder(folder):
    """The weights in one part's folder, whole or in shards, full or half precision -> {name: tensor}."""
    folder = Path(folder)
    for kind in ("safetensors", "bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for variant in ("", ".fp16"):
                if (file := folder / f"{stem}{variant}.{kind}").is_file():
                    return read_tensors(file)
                for index in (f"{stem}.{kind}.index{variant}.json", f"{stem}{variant}.{kind}.index.json"):
                    if (folder / index).is_file():
                        files = read_json(folder / index).get("weight_map")
                        if not (isinstance(files, dict) and all(isinstance(file, str) for file in files.values())):
                            raise ValueError(f"{folder / index} does not say where each tensor is: copy it again")
                        shards = [read_tensors(folder / file) for file in sorted(set(files.values()))]
                        return {name: tensor for shard in shards for name, tensor in shard.items()}
    raise FileNotFoundError(f"there are no weights in {folder}: expected diffusion_pytorch_model.safetensors, "
                            "model.safetensors, or the same as .bin")


@contextlib.contextmanager
def uncollected():
    """No garbage collection inside: a model is half a million objects that stay, through which Python would go again
    and again for garbage, half of the time that a checkpoint takes to load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
