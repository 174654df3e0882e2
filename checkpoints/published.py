"""The published weight files of the networks that the papers lean on: their names, where they lie, reading them.

    model = load("sam", find("sam"))          sam.SAM; "raft" gives a raft.RAFT, "midas" a midas.DPT, "blip" a blip.BLIP
    metric = load_lpips(*find_lpips())        lpips.LPIPS

They are too large to be shipped here. A user puts a file, under its published name, into FOLDER or names another
folder. networks/ knows what the tensors mean, and nothing of files.
"""

import hashlib
import re
from pathlib import Path

import torch

from checkpoints.read import copy_tensors, describe_misfits, read_tensors
from common.cli import WEIGHTS as FOLDER
from common.cli import join_names
from common.devices import choose_stored
from networks import blip, lpips, midas, raft, sam

PUBLISHED = {  # kind: what it is, its files from the first choice to the last, and where they come from
    "raft": ("RAFT-Large", ("raft_large_C_T_SKHT_V2-ff5fadd5.pth", "raft-things.pth"),
             "torchvision's Raft_Large_Weights.C_T_SKHT_V2, or the models of github.com/princeton-vl/RAFT"),
    "sam": ("Segment Anything", ("sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "sam_vit_b_01ec64.pth"),
            "the model checkpoints of github.com/facebookresearch/segment-anything"),
    "midas": ("MiDaS's DPT-Large", ("dpt_large_384.pt",), "the releases of github.com/isl-org/MiDaS"),
    "blip": ("BLIP", ("blip-image-captioning-base/model.safetensors", "blip-image-captioning-base/pytorch_model.bin"),
             "Salesforce's folder of that name on Hugging Face, with its vocab.txt or tokenizer.json"),
}
LPIPS = "alexnet-owt-7be5be79.pth", "alex.pth"  # the backbone's file, and the heads'
LPIPS_SOURCE = ("torchvision's IMAGENET1K_V1 weights of AlexNet, and lpips/weights/v0.1 of "
                "github.com/richzhang/PerceptualSimilarity")
BUILD = {  # kind: a stored name -> the model's, or None for what it has no use of; {name: shape} -> model
    "raft": (raft.rename, lambda shapes: raft.RAFT()),
    "sam": (lambda name: name, lambda shapes: sam.SAM(sam.config_from_shapes(shapes))),
    "midas": (midas.rename, lambda shapes: midas.DPT(midas.config_from_shapes(shapes))),
    "blip": (blip.rename, lambda shapes: blip.BLIP(blip.config_from_shapes(shapes))),
}
SIGNS = {  # how the names of tensors begin in files that may be mistaken for each other
    "raft": (r"(module\.)?(fnet|feature_encoder)\.", "RAFT"),
    "sam": (r"image_encoder\.(patch_embed|blocks)\.", "Segment Anything"),
    "midas": (r"pretrained\.", "a MiDaS"),
    "blip": (r"text_decoder\.bert\.", "BLIP's captioner"),
    "backbone": (r"features\.\d+\.", "a classifier of torchvision, as LPIPS looks into"),
    "heads": (r"lin\d\.model\.", "the heads of LPIPS"),
    "sd": (r"model\.diffusion_model\.", "Stable Diffusion"),
}


def find(kind, folder=FOLDER):
    """The first file of 'raft', 'sam', 'midas' or 'blip' that is in the folder -> Path. FileNotFoundError: none is."""
    what, files, source = PUBLISHED[kind]
    for name in files:
        if (path := Path(folder) / name).is_file():
            return path
    raise FileNotFoundError(f"{what} needs {join_names(files)}, from {source}, and none is in {folder}: put it there, "
                            "or name another folder by --networks DIR")


def find_lpips(folder=FOLDER):
    """The two files of LPIPS -> (Path, Path)"""
    paths = [Path(folder) / name for name in LPIPS]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"LPIPS needs {' and '.join(LPIPS)}, from {LPIPS_SOURCE}, and there is no "
                                f"{' and no '.join(absent)} in {folder}: put it there, or name another folder by "
                                "--networks DIR")
    return tuple(paths)


def digest(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(kind, path, dtype=None, device="cpu"):
    """A published file, or one of the same layout at another width -> raft.RAFT, sam.SAM, midas.DPT, blip.BLIP: frozen,
    in eval mode.

    kind   'raft', 'sam', 'midas' or 'blip'
    path   .pth, .pt or .safetensors; RAFT in torchvision's or in its authors' layout
    dtype  None: as stored where the device computes well in that (see `choose_stored`), and on the CPU the weights stay
           in the file, mapped: processes share its pages

    FileNotFoundError or ValueError, of one line, for a file that is not there, damaged, refused (see `read_tensors`),
    not whole, or another network's.
    """
    what, files, _ = PUBLISHED[kind]
    expected = f"expected {what} as published ({join_names(files)})"
    stored = read_contents(path, expected)

    # Name the tensors as the model does, build it on the meta device, and compare.
    rename, build = BUILD[kind]
    tensors = {rename(name): tensor for name, tensor in stored.items() if rename(name)}
    try:
        with torch.device("meta"):
            model = build({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        problems = describe_misfits(model, tensors)
    except KeyError as name:
        problems = f"there is no tensor {name.args[0]}; the first is {next(iter(stored))}"
    except (LookupError, ValueError, RuntimeError, ZeroDivisionError) as e:
        problems = f"its shapes make no sense: {str(e).splitlines()[0]}"
    if problems:
        raise ValueError(f"{path}: {expected}, and {recognise(stored, kind) or problems}")

    dtype = dtype or choose_stored({t.dtype for t in tensors.values() if t.is_floating_point()}, device)
    # The frequencies of SAM's positional encoding keep their digits: with 8 bits it would confuse distant places.
    dtypes = {}
    for name, tensor in tensors.items():
        rounded = tensor.is_floating_point() and not name.endswith("gaussian_matrix")
        dtypes[name] = dtype if rounded else tensor.dtype
    model.load_state_dict(copy_tensors(path, tensors, device, dtypes), assign=True)
    return model.requires_grad_(False).eval()


def load_lpips(backbone, heads):
    """Two files -> lpips.LPIPS, frozen, in eval mode, on the CPU.

    backbone  torchvision's file of AlexNet
    heads     alex.pth, of the `lpips` package's weights/v0.1

    Errors as `load`.
    """
    with torch.device("meta"):
        model = lpips.LPIPS()
    tensors = {}
    for kind, path, prefix, what in (("backbone", backbone, "features.", "torchvision's whole AlexNet"),
                                     ("heads", heads, "lin", "the heads of LPIPS with AlexNet")):
        expected = f"expected {what}"
        stored = read_contents(path, expected)
        mine = {name: tensor for name, tensor in stored.items() if kind == "heads" or name.startswith(prefix)}
        rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
        if problems := describe_misfits(model, rest | mine):
            raise ValueError(f"{path}: {expected}, and {recognise(stored, kind) or problems}")
        tensors |= mine
    tensors = copy_tensors(backbone, tensors, "cpu", dict.fromkeys(tensors, torch.float32))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def read_contents(path, expected):
    try:
        return read_tensors(path)
    except ValueError as e:
        raise ValueError(f"{e}; {expected}") from None


def recognise(stored, kind):
    """What tensors of these names are instead of the kind, in words; None if they are of that kind, or unknown."""
    for other, (sign, words) in SIGNS.items():
        if any(re.match(sign, name) for name in stored):
            return None if other == kind else f"this is {words}"
    return None
