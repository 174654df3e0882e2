"""What a training run leaves in its folder. Every file appears whole or not at all.

    STAGE-state-0000500.safetensors   all that the next step depends on, as tensors and JSON; no pickle
    STAGE-loss.png                    the loss curve
    STAGE-samples.png                 a sheet of samples
    any.safetensors                   tensors that are expensive to make, kept for the next start
"""

import contextlib
import hashlib
import json
import math
import shlex
import shutil
import struct
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common.files import atomic_write, check_writable, lock_folder, read_metadata, remove_leftovers
from common.pictures import save_picture, tensor_to_picture
from common.processes import process_rank, wait_for_all

# What --resume may change: how long, how fast and in what memory, but not what the weights and the batches mean
FREE = ("steps", "lr", "warmup", "save_every", "precision", "micro_batch", "checkpointing", "compile", "held_out")
KEPT = 3  # states: the newest to go on from, the others in case a disk or a learning rate spoils it

# ---------------------------------------------------------------------------------------------------------------------
# States


def trained_parameters(model):
    """-> {name: parameter} of what is trained, in the model's order"""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_state(out, stage, model, average, optimizers, losses, validation, recipe):
    """Draw the curve of the losses, write the state after len(losses) steps, and delete all but the last KEPT.

    average     the model that follows the weights, or the model itself where there is none
    losses      [loss of each step];  validation  [[steps done, loss]]
    """
    draw_curve(losses, validation, out / f"{stage}-loss.png")  # first: from the state on, nothing would draw it again
    tensors = {}
    followers = dict(average.named_parameters())
    moments = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, p in trained_parameters(model).items():
        tensors[f"model.{name}"] = p
        if average is not model:
            tensors[f"average.{name}"] = followers[name]
        tensors[f"m.{name}"] = moments[p]["exp_avg"]
        if "exp_avg_sq" in moments[p]:  # Adam's
            tensors[f"v.{name}"] = moments[p]["exp_avg_sq"]

    # The safetensors format: the header's length, the header, the data. The library's own writer wants all tensors
    # contiguous in memory at once, which at full size are 19 GB.
    notes = {"losses": losses, "validation": validation, "recipe": asdict(recipe)}
    header = {"__metadata__": {name: json.dumps(note) for name, note in notes.items()}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    path = out / f"{stage}-state-{len(losses):07d}.safetensors"
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)

    # Later states can only be damaged ones, which the run went back before.
    kept = [p for p in list_states(out, stage) if p.name <= path.name][-KEPT:]
    for old in set(list_states(out, stage)) - set(kept):
        old.unlink(missing_ok=True)


def list_states(out, stage):
    """-> the state files of a stage, from old to new"""
    return sorted(out.glob(f"{stage}-state-{'[0-9]' * 7}.safetensors"))


def check_room(out, stage, model, average, recipe, done):
    """ValueError unless the disk has room for the states that a run keeps, and for one more while it is written.

    done  steps of recipe.steps that are behind it
    """
    numbers = sum(p.numel() for p in trained_parameters(model).values())
    moments = 1 if recipe.muon else 2  # of most weights
    state = 4 * numbers * (1 + moments + (average is not model))
    saves = math.ceil(recipe.steps / recipe.save_every) - done // recipe.save_every
    more = state * min(saves, KEPT + 1 - len(list_states(out, stage)))
    free = shutil.disk_usage(out).free
    if more > free:
        raise ValueError(f"{out} has {free / 2**30:.1f} GiB left, and this training's states need {more / 2**30:.1f}: "
                         "make room, or choose another --out")


@contextlib.contextmanager
def open_run(out, stage, resume, model):
    """The folder of a run, which one process at a time writes to. A start that fails leaves no empty folder.

    ValueError if `out` cannot be written, or holds a run's states, or its `model`, and this one does not go on.
    """
    check_writable(out)
    new = not out.exists()
    try:
        with lock_folder(out):
            if not resume and list_states(out, stage):
                raise ValueError(f"{out} holds the states of a run: --resume goes on with it, another --out starts "
                                 "anew")
            if not resume and model.exists():
                raise ValueError(f"{model} is there already, and would be written over: choose another --out")
            remove_leftovers(out, f"{stage}-*")
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            if new:
                out.rmdir()


def say_kept(program, out, stage):
    """-> after an interrupt: what is kept of the training, and how to go on"""
    states = list_states(out, stage)
    if not states:
        return "no step is saved yet; start again"
    steps = int(states[-1].stem.rsplit("-", 1)[1])
    return f"the state after step {steps} is saved; {program} --out {shlex.quote(str(out))} --resume goes on"


def read_newest_state(out, stage):
    """-> path of the newest undamaged state, {"losses", "validation", "recipe"}. ValueError if there is none."""
    paths = list_states(out, stage)
    if not paths:
        raise ValueError(f"nothing to resume: there is no {stage}-state-*.safetensors in {out}; "
                         "leave out --resume to start")
    for path in reversed(paths):
        try:
            with safe_open(path, "pt") as file:
                notes = {name: json.loads(note) for name, note in file.metadata().items()}
            if are_curves(notes["losses"], notes["validation"], int(path.stem[-7:])) and "recipe" in notes:
                return path, notes
        except (SafetensorError, AttributeError, KeyError, ValueError, RecursionError):
            pass
        if path != paths[0]:
            tqdm.write(f"{path} is damaged: going on from the state before it", file=sys.stderr)
    raise ValueError(f"{paths[-1]} is damaged, or no training state")


def are_curves(losses, validation, steps):
    """Whether they are what `save_state` writes: [loss of each step], [[steps done, loss]]"""
    pairs = isinstance(validation, list) and all(isinstance(p, list) and len(p) == 2 for p in validation)
    if not pairs or not isinstance(losses, list) or len(losses) != steps:
        return False
    values = losses + [value for _, value in validation]
    return all(type(n) is int and 0 < n <= steps for n, _ in validation) and all(type(v) is float for v in values)


def read_recipe(out, stage, kind):
    """The recipe, of dataclass `kind`, of the run that left its state in `out`: what --resume goes on with."""
    path, notes = read_newest_state(out, stage)
    try:
        recipe = kind(**notes["recipe"])
    except TypeError:
        raise ValueError(f"{path} is the state of another version of this program: start anew, "
                         "with another --out") from None
    for field in fields(kind):
        value = getattr(recipe, field.name)
        if field.type is tuple and isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
            setattr(recipe, field.name, value)
        if not is_value(value, field):
            raise ValueError(f"{path} is damaged: its recipe has {field.name} = {str(value)[:40]!r}. Delete it, and "
                             "--resume goes on from the state before it")
    return recipe


def is_value(value, field):
    """Whether a field of a recipe can have this value: its type, and the widest bounds of any option"""
    kinds = get_args(field.type) or (field.type,)
    if type(value) in (int, float):
        low = 1 if field.name in ("steps", "batch", "warmup", "save_every", "latent", "scenes") else 0
        return (type(value) in kinds or float in kinds) and low <= value <= 10**9
    if isinstance(value, tuple):
        return tuple in kinds and all(type(n) is int and 0 < n <= 10**9 for n in value)
    return type(value) in kinds and (field.name != "precision" or value in ("auto", "fp32", "bf16"))


def change_recipe(recipe, args):
    """The recipe with the fields that the command line names."""
    given = {field.name: getattr(args, field.name, None) for field in fields(recipe)}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def resume_recipe(out, stage, kind, args, init=None):
    """`read_recipe`, with what the command line changes. ValueError if that would change what the weights mean.

    init  the weights that a run starts from where its recipe names none
    """
    recipe = read_recipe(out, stage, kind)
    changed = change_recipe(recipe, args)
    for field in fields(kind):
        old, new = (getattr(r, field.name) for r in (recipe, changed))
        if field.name == "init":
            old, new = old or init, new or init
        # With pictures from a folder, those held out are not trained on.
        free = field.name in FREE and not (field.name == "held_out" and recipe.data != "toy" and bool(old) != bool(new))
        if not (free or old == new or is_moved(field.name, old, new)):
            raise ValueError(f"--resume cannot change {write_option(field.name, new)}: the run in {out} was begun with "
                             f"{write_option(field.name, old)}. Leave it out, or start anew with another --out")
    return changed


def is_moved(name, old, new):
    """Whether a path names the same as before, or what has gone from where it was."""
    if old is None or name not in ("init", "data") or name == "data" and "toy" in (old, new):
        return False
    return Path(old).resolve() == Path(new).resolve() or not Path(old).exists()


def write_option(name, value):
    """A field of a recipe, as on the command line"""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"no --{option}" if value is None else f"--{option} {value}"


def restore_state(out, stage, model, average, optimizers):
    """Fill model, average and optimizers from the newest state -> losses, validation. ValueError: another model's."""
    path, notes = read_newest_state(out, stage)
    losses = notes["losses"]
    followers = dict(average.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            def fill(tensor, name):
                """From the tensor of that name, which must be of the same kind: copy_ would also widen and convert."""
                found = file.get_tensor(name)
                if found.shape != tensor.shape or found.dtype != torch.float32:
                    raise RuntimeError(f"{name} is {found.dtype} {list(found.shape)}, not {list(tensor.shape)}")
                return tensor.copy_(found)

            for name, p in trained_parameters(model).items():
                fill(p, f"model.{name}")
                if average is not model:
                    fill(followers[name], f"average.{name}")
                # The moments get the parameters' memory format, as they have in a run that never stopped. Fused Adam
                # keeps its count of steps on the parameter's device.
                state = owner[p].state[p]
                state["exp_avg"] = fill(torch.empty_like(p), f"m.{name}")
                if isinstance(owner[p], torch.optim.AdamW):
                    state["exp_avg_sq"] = fill(torch.empty_like(p), f"v.{name}")
                    state["step"] = torch.tensor(float(len(losses)), device=p.device)
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f"{path} is the state of another model ({str(e).splitlines()[0]})") from None
    return losses, notes["validation"]


def generator_at(seed, step):
    """The random generator of one step: exact resume without saving any random state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are expensive to make


def cache_batches(path, made_from, batches, encode, total=None):
    """The {name: tensor} in the file at `path` if it was made from that, a text such as a `digest`; otherwise what
    encode(batch) gives for all batches together, which is kept there. One process makes them, the others wait.

    total  how many batches, where they have no len()
    """
    metadata = {"made_from": made_from}
    if process_rank() == 0 and read_metadata(path) != metadata:
        parts = []
        with torch.no_grad():
            for batch in tqdm(batches, path.stem, total, unit="batch", mininterval=1):
                parts.append({name: x.cpu() for name, x in encode(batch).items()})
        tensors = {name: torch.cat([part.pop(name) for part in parts]).contiguous() for name in list(parts[0])}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)
    wait_for_all()
    return load_file(path)


def digest(network, *data):
    """A text that differs for other weights, or other data (by its repr)."""
    h = hashlib.sha256(repr(data).encode())
    for p in network.parameters():
        h.update(p.detach().cpu().numpy().tobytes())
    return h.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_sheet(images, path):
    """images (rows, columns, 3, H, W) in [0, 1] as a grid PNG."""
    rows, columns, _, h, w = images.shape
    grid = images.permute(2, 0, 3, 1, 4).reshape(3, rows * h, columns * w)
    save_picture(tensor_to_picture(grid), path, {})


def draw_curve(losses, validation, path, width=900, height=400):
    """Loss against step, both axes logarithmic. A point of the blue line is the mean over a column of the picture; the
    orange line is `validation`, [[step, loss]]."""
    edges = np.unique(np.geomspace(1, len(losses) + 1, width // 3).astype(int)) - 1
    means = [np.mean(losses[a:b]) for a, b in zip(edges[:-1], edges[1:])]
    lines = [(edges[1:], means, (20, 80, 200))]
    if validation:
        lines.append((*np.transpose(validation), (240, 120, 0)))

    # Both lines in the same frame, 60 pixels from the left and 40 from the bottom
    x = np.log(np.concatenate([steps for steps, _, _ in lines]))
    y = np.log(np.maximum(np.concatenate([values for _, values, _ in lines]), 1e-12))
    canvas = np.full((height, width, 3), 255, np.uint8)
    for steps, values, colour in lines:
        px = 60 + (np.log(steps) - x.min()) / max(np.ptp(x), 1e-9) * (width - 80)
        py = 20 + (y.max() - np.log(np.maximum(values, 1e-12))) / max(np.ptp(y), 1e-9) * (height - 60)
        points = np.stack([px, py], 1).astype(np.int32)
        cv2.polylines(canvas, [points], False, colour, 2, cv2.LINE_AA)

    text = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.4, color=(60, 60, 60), lineType=cv2.LINE_AA)
    cv2.putText(canvas, f"{math.exp(y.max()):.3g}", (8, 24), **text)
    cv2.putText(canvas, f"{math.exp(y.min()):.3g}", (8, height - 40), **text)
    label = f"step 1 .. {len(losses)} (log), loss (log)" + (", of held-out pairs orange" if validation else "")
    cv2.putText(canvas, label, (60, height - 12), **text)
    save_picture(Image.fromarray(canvas), path, {})
