"""The training loop that all stages of train.py share: exact resume, whole checkpoints, many processes, a clear stop.

    average = fit("mfx", model, loss, sheet, recipe, out, resume)

`loss` makes its own data and noise, as a function of the step alone, and the loop slices every step's batch: for the
processes that torchrun started, and for each of them into micro-batches, whose gradients add up. So a run that was
stopped and resumed sees what an unbroken one does, and two processes compute what one would.

OUT gets the last KEPT training states, STAGE-state-0000500.safetensors, and two pictures: STAGE-loss.png and
STAGE-samples.png. Files appear whole or not at all: they are written beside their place and renamed into it.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import struct
import sys
import warnings
from dataclasses import asdict
from datetime import timedelta

import cv2
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import diffusion
import unet
from common.devices import choose_precision
from common.files import atomic_write

KEPT = 3  # training states: the newest to go on from, the others should a disk or a learning rate have spoiled it
EVERY = 50  # steps between two looks at the losses on a GPU, each of which waits until it has done all its work

# ---------------------------------------------------------------------------------------------------------------------
# Many processes, of which each has a share of every batch, and the first alone writes


def join(device):
    """Join the processes that torchrun started, if it did. -> this process's own device"""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # the first process may take hours for encoding pairs, while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def micro_batches(recipe):
    """-> the slices of every step's batch that this process computes, in their order. ValueError if they don't fit"""
    share = recipe.batch // world()
    size = min(recipe.micro_batch or share, share)
    if not size or recipe.batch % (size * world()):
        raise ValueError(f"a batch of {recipe.batch} cannot be cut into micro-batches of {size or 1} for {world()} "
                         "processes: choose another --batch or --micro-batch")
    return [slice(a, a + size) for a in range(rank() * size, recipe.batch, world() * size)]


class Loss(nn.Module):
    """The loss as the forward pass of a module: where PyTorch's DDP prepares to average gradients over processes."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, step, part):
        return self.loss(step, part)


# ---------------------------------------------------------------------------------------------------------------------
# What the stages make their batches of


def at(seed, step):
    """The random generator of one step: exact resume without saving any random state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def stratified(batch, generator):
    """One timestep from each of `batch` equal parts of 0 .. T-1: uniform, with less variance than free draws."""
    return ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * diffusion.T).long()


def made_once(path, made_from, make):
    """The tensors {name: tensor} in the file at `path`, if it was made from that (a text, e.g. a `digest`); otherwise
    those of make(), which are kept there. One process makes them, the others wait."""
    made_from = {"made_from": made_from}
    if rank() == 0 and not fresh(path, made_from):
        tensors = make()
        with atomic_write(path) as tmp:
            save_file(tensors, tmp, made_from)
    if world() > 1:
        dist.barrier()
    return load_file(path)


def digest(autoencoder, *data):
    """Tells cached latents of this autoencoder and data from others."""
    h = hashlib.sha256(repr(data).encode())
    for p in autoencoder.parameters():
        h.update(p.detach().cpu().numpy().tobytes())
    return h.hexdigest()


def fresh(path, made_from):
    """Is there a file of tensors, made from that?"""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == made_from
    except (OSError, SafetensorError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Less memory, more speed

BLOCKS = unet.ResnetBlock, unet.Attention, unet.FeedForward  # nearly all of a UNet's work; no side effects to repeat


def channels_last(x):
    """The memory format that convolutions are fastest in."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def checkpointing(model):
    """Gradient checkpointing: of these blocks only the inputs are kept for the backward pass, which computes the rest
    again. Less memory for a third more work, and the same gradients."""
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False  # nothing in them is random
            )


def compiling(model):
    """torch.compile, block by block: those that `checkpointing` computes again, which goes around what is compiled."""
    torch._dynamo.config.recompile_limit = 64  # one function serves blocks of many widths and resolutions
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = torch.compile(block.forward, dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fit(stage, model, loss, sheet, recipe, out, resume, validate=None):
    """Adam on `loss` for recipe.steps steps. -> the average of the weights over the steps; without one, the model

    loss      (step, part) -> scalar, the mean over the slice `part` of this step's batch. Called with every
              process's `micro_batches` in turn, step by step
    sheet     average -> pictures (rows, columns, 3, H, W) in [0, 1], drawn at every save; or None
    validate  average -> scalar, computed at every save; or None
    FloatingPointError if anything ceases to be finite, ValueError for a state of another model.
    """
    parts = micro_batches(recipe)
    average = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema else model
    followers, parameters = dict(average.named_parameters()), trained(model)
    device = next(iter(parameters.values())).device
    bf16 = choose_precision("auto", device) == torch.bfloat16  # weights stay fp32; matrices are multiplied in half
    # No cache of weights in half precision: each is used once per forward pass, and together they are 3 GB in SD 1.4.
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    if recipe.compile:
        compiling(model)
    if recipe.checkpointing:
        checkpointing(model)

    # Where nothing needs all gradients at once (to add, average or clip them), each parameter makes its step within the
    # backward pass, when its gradient is there, and drops the gradient: saves as much memory as the weights take.
    at_once = recipe.clip is None and len(parts) == world() == 1
    adam = functools.partial(torch.optim.AdamW, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True,
                             weight_decay=recipe.weight_decay)
    optimizers = [adam([p]) for p in parameters.values()] if at_once else [adam(parameters.values())]
    owner = dict(zip(parameters.values(), optimizers if at_once else optimizers * len(parameters)))

    def step_now(p):
        owner[p].step()
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(step_now) for p in owner] if at_once else []
    first, losses, validation, kept = restore(out, stage, model, average, owner) if resume else (0, [], [], [])
    model_loss, pending = Loss(model, loss), []  # pending: what the device has not told yet
    if world() > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # those of 1x1 convolutions are ambiguous
        model_loss = DistributedDataParallel(model_loss, gradient_as_bucket_view=True)

    def settle():
        """pending -> losses. On a CPU before the optimizer's step, unless that is `at_once`; before a checkpoint in any
        case."""
        values = torch.stack(pending)
        if world() > 1:
            dist.all_reduce(values)
        for value, norm in (values / world()).tolist():
            if not math.isfinite(value * norm):
                raise FloatingPointError(f"loss or gradient is not finite at step {len(losses)}: resume with a lower "
                                         "--lr")
            losses.append(value)
        pending.clear()

    bar = tqdm(range(first, recipe.steps), stage, recipe.steps, initial=first, mininterval=1, smoothing=0.02,
               disable=rank() > 0)
    for step in bar:
        rate = recipe.lr * min(1, (step + 1) / recipe.warmup)
        if recipe.cosine:
            rate *= 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for part in parts:
            wait = world() > 1 and part is not parts[-1]  # gradients are averaged over the processes once a step
            with model_loss.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    value = model_loss(step, part) / len(parts)
                value.backward()
            total += value.detach()
        norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.clip) if recipe.clip else torch.ones_like(total)
        pending.append(torch.stack([total, norm]))
        save_now = (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps
        if save_now or device.type != "cuda" or (step + 1) % EVERY == 0:
            settle()
        for optimizer in () if at_once else optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if recipe.ema:
            decay = min(recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_([followers[n] for n in parameters], list(parameters.values()), 1 - decay)
        if rank() == 0 and losses:
            images_s = recipe.batch * (bar.format_dict["rate"] or 0)
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", images_s=f"{images_s:.1f}", refresh=False)
        if save_now:
            if not torch.stack([p.isfinite().all() for p in parameters.values()]).all():
                raise FloatingPointError(f"weights are not finite after step {step}: resume with a lower --lr")
            if rank() == 0:
                with torch.no_grad(), autocast():
                    if validate:
                        validation.append([step + 1, float(validate(average))])
                    pictures = sheet(average) if sheet else None
                kept.append(save(out, stage, model, average, owner, losses, validation, recipe))
                for old in set(states(out, stage)) - set(kept[-KEPT:]):
                    old.unlink()
                draw_curve(losses, validation, out / f"{stage}-loss.png")
                if sheet:
                    draw_sheet(pictures, out / f"{stage}-samples.png")
    for hook in hooks:
        hook.remove()
    return average


# ---------------------------------------------------------------------------------------------------------------------
# The training state: everything that the next step depends on, as one safetensors file; no pickle


def save(out, stage, model, average, owner, losses, validation, recipe):
    """-> the file. Tensor by tensor: the library's own writer wants all of them contiguous, in memory, at once."""
    tensors, followers = {}, dict(average.named_parameters())
    for name, p in trained(model).items():
        tensors[f"model.{name}"] = p
        if recipe.ema:
            tensors[f"average.{name}"] = followers[name]
        tensors[f"m.{name}"], tensors[f"v.{name}"] = (owner[p].state[p][k] for k in ("exp_avg", "exp_avg_sq"))
    told = {"losses": losses, "validation": validation, "recipe": asdict(recipe)}
    header, end = {"__metadata__": {k: json.dumps(v) for k, v in told.items()}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [end, end := end + 4 * t.numel()]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with atomic_write(out / f"{stage}-state-{len(losses):07d}.safetensors") as tmp, open(tmp, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for t in tensors.values():
            file.write(t.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return out / f"{stage}-state-{len(losses):07d}.safetensors"


def states(out, stage):
    """The state files of a stage, from old to new. (Once there was one, without a number.)"""
    return [*out.glob(f"{stage}-state.safetensors"), *sorted(out.glob(f"{stage}-state-{'[0-9]' * 7}.safetensors"))]


def newest(out, stage):
    """-> the newest whole state file, {what is told in it}. ValueError if there is none."""
    paths = states(out, stage)
    if not paths:
        raise ValueError(f"nothing to resume: there is no {stage}-state-*.safetensors in {out}; leave out --resume to "
                         "start")
    for path in reversed(paths):
        try:
            with safe_open(path, "pt") as file:
                told = {"validation": []} | {k: json.loads(v) for k, v in file.metadata().items()}
            if {"losses", "recipe"} <= told.keys():
                return path, told
        except (SafetensorError, AttributeError, ValueError):
            pass
        if path != paths[0]:
            tqdm.write(f"{path} is damaged: going on from the state before it", file=sys.stderr)
    raise ValueError(f"{paths[-1]} is damaged, or no training state")


def restore(out, stage, model, average, owner):
    """-> number of steps done, their losses, the validation losses, the state files to keep"""
    path, told = newest(out, stage)
    followers = dict(average.named_parameters())
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, p in trained(model).items():
                p.copy_(file.get_tensor(f"model.{name}"))
                if average is not model:
                    followers[name].copy_(file.get_tensor(f"average.{name}"))
                # The moments get the parameters' memory format, as they have in a run that never stopped.
                m, v = (torch.empty_like(p).copy_(file.get_tensor(f"{k}.{name}")) for k in "mv")
                count = torch.tensor(float(len(told["losses"])), device=p.device)  # where fused Adam wants it
                owner[p].state[p] = {"step": count, "exp_avg": m, "exp_avg_sq": v}
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f"{path} is the state of another model ({str(e).splitlines()[0]})") from None
    paths = states(out, stage)
    return len(told["losses"]), told["losses"], told["validation"], paths[: paths.index(path) + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_sheet(images, path):
    """images (rows, columns, 3, H, W) in [0, 1] as a grid PNG."""
    rows, columns, _, h, w = images.shape
    grid = images.clamp(0, 1).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    with atomic_write(path) as tmp:
        tmp.write_bytes(cv2.imencode(".png", (grid.float().numpy()[..., ::-1] * 255).round().astype(np.uint8))[1])


def draw_curve(losses, validation, path, width=900, height=400):
    """Loss against step, both axes logarithmic. A point of the blue line is the mean over its column of the picture;
    validation, [[step, loss]], is the orange line."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    edges = np.unique(np.geomspace(1, len(losses) + 1, width // 3).astype(int)) - 1
    means = [np.mean(losses[a:b]) for a, b in zip(edges[:-1], edges[1:])]
    lines = [(edges[1:], means, (200, 80, 20))] + ([(*zip(*validation), (0, 120, 240))] if validation else [])
    x, y = (np.log(np.maximum(np.concatenate([line[i] for line in lines]), 1e-12)) for i in (0, 1))
    for steps, values, colour in lines:
        px = 60 + (np.log(steps) - x.min()) / max(np.ptp(x), 1e-9) * (width - 80)
        py = 20 + (y.max() - np.log(np.maximum(values, 1e-12))) / max(np.ptp(y), 1e-9) * (height - 60)
        cv2.polylines(canvas, [np.stack([px, py], 1).astype(np.int32)], False, colour, 2, cv2.LINE_AA)
    text = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.4, color=(60, 60, 60), lineType=cv2.LINE_AA)
    for value, where in ((y.max(), 24), (y.min(), height - 40)):
        cv2.putText(canvas, f"{math.exp(value):.3g}", (8, where), **text)
    told = f"step 1 .. {len(losses)} (log), loss (log)" + (", of held-out pairs orange" if validation else "")
    cv2.putText(canvas, told, (60, height - 12), **text)
    with atomic_write(path) as tmp:
        tmp.write_bytes(cv2.imencode(".png", canvas)[1])
