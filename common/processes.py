"""Training in many processes, as torchrun starts them: each has a share of every batch, and the first alone writes."""

import atexit
import math
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def join_processes(device):
    """Join the processes that torchrun started, if it did. -> this process's own device"""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The first process may take hours to encode pairs, while the others wait.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
        atexit.register(dist.destroy_process_group)
    return device


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def slice_batch(batch, micro_batch=None):
    """-> the slices of every step's batch that this process computes, in order. ValueError if they do not fit.

    micro_batch  samples of a slice, at most; None = all of this process's share
    """
    share = batch // process_count()
    size = min(micro_batch or share, share)
    if not size or batch % (size * process_count()):
        raise ValueError(f"a batch of {batch} cannot be cut into micro-batches of {size or 1} for "
                         f"{process_count()} processes: choose another --batch or --micro-batch")
    starts = range(process_rank() * size, batch, process_count() * size)
    return [slice(start, start + size) for start in starts]


class Loss(nn.Module):
    """A loss (step, part) -> scalar as the forward pass of a module that holds the model: there PyTorch's DDP prepares
    to average gradients over processes."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, step, part):
        return self.loss(step, part)


def share_loss(model, loss):
    """-> the loss; in many processes, one whose backward pass averages the model's gradients over them"""
    if process_count() == 1:
        return loss
    warnings.filterwarnings("ignore", "Grad strides do not match")  # those of 1x1 convolutions are ambiguous
    return DistributedDataParallel(Loss(model, loss), gradient_as_bucket_view=True)


def largest_over_processes(number):
    """The largest of all processes' whole numbers: so that they agree on one"""
    if process_count() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def read_losses(pending, step):
    """[(loss, gradient norm)] of the steps from `step` on, as tensors -> losses, as numbers"""
    values = torch.stack(pending)
    if process_count() > 1:
        dist.all_reduce(values)
    values = (values / process_count()).tolist()
    for i, (value, norm) in enumerate(values):
        if not math.isfinite(value * norm):
            raise FloatingPointError(f"loss or gradient is not finite at step {step + i}: "
                                     "resume with a lower --lr")
    return [value for value, _ in values]
