"""Less memory, or more speed, for the blocks of a network that is trained. `kinds` are their classes: nearly all of the
network's work, and without side effects that a second run would repeat."""

import functools

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model, kinds):
    """Gradient checkpointing: only the inputs of these blocks are kept for the backward pass, which computes the rest
    again. Less memory for a third more work, and the same gradients."""
    for block in model.modules():
        if isinstance(block, kinds):
            # Nothing in them is random, so no random state needs keeping.
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )


def compile_blocks(model, kinds):
    """torch.compile, block by block, because checkpointing goes around what is compiled."""
    torch._dynamo.config.recompile_limit = 64  # one function serves blocks of many widths and resolutions
    for block in model.modules():
        if isinstance(block, kinds):
            block.forward = torch.compile(block.forward, dynamic=False)


def to_channels_last(x):
    """The memory format that convolutions are fastest in."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
