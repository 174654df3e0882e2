"""Where a program computes, in what precision, and how fast.

    device = choose_device("auto")               cuda, mps or cpu
    dtype = choose_precision("auto", device)     half where that is faster
    make_fast(model, device)                     the fastest way for each layer, without waiting for it
    seconds = compile_unets(model, run)          faster still after minutes of compiling; run() is a first short edit
"""

import time

import torch

from kernels.winograd import quicken

# ---------------------------------------------------------------------------------------------------------------------
# Where, and in what precision


def choose_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. ValueError for one that cannot be used here."""
    if name != "auto":
        try:
            if torch.device(name).type not in ("cpu", "cuda", "mps"):
                raise RuntimeError("choose auto, cpu, cuda or mps")
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {name} cannot be used here ({str(e).splitlines()[0]})") from None
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(name, device):
    """Half precision where the hardware multiplies matrices in it faster than in single precision."""
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    # bf16 instructions without AMX tiles (AVX512-BF16 alone) are slower than single precision: python -m bench unet
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# How


def make_fast(model, device):
    """-> the StableDiffusion or MagicFixup, changed in place by what costs nothing but memory: quick convolutions on a
    CPU; on a GPU weights in the order in which tensor cores read them."""
    for network in (model.vae, *unets(model)):
        if device.type == "cpu":
            quicken(network, keep=network is not model.vae)  # the autoencoder runs once or twice
        elif device.type == "cuda":
            network.to(memory_format=torch.channels_last)
    return model


def unets(model):
    """Of a StableDiffusion or a MagicFixup."""
    return [n for n in (getattr(model, name, None) for name in ("unet", "synthesizer", "extractor")) if n is not None]


def compile_unets(model, run):
    """Let PyTorch compile the UNets of a StableDiffusion or a MagicFixup, in place -> the seconds that it took.

    run  a function without arguments, an edit on which the compiling happens: each size of batch that is to come should
         come in it. Its own time is in the seconds

    One step of a denoising UNet is many small kernels. On a GPU they are fused, recorded, and sent again as one CUDA
    graph; its shapes must stay what they were. A Magic Fixup's extractor runs over many timesteps in one batch, whose
    size may vary, and has nothing to gain from a graph. The autoencoder runs once or twice: no time to win back.

    ValueError of one line where there is no compiler that works.
    """
    for network in unets(model):
        if network is getattr(model, "extractor", None):
            network.features = torch.compile(network.features)
        else:
            network.forward = fresh(torch.compile(network.forward, mode="reduce-overhead", dynamic=False))
    start = time.perf_counter()
    try:
        run()
    except torch._dynamo.exc.TorchDynamoException as e:
        why = (str(getattr(e, "inner_exception", e)) or type(e).__name__).splitlines()[0]
        raise ValueError(f"--compile does not work here, leave it out: {why}") from None
    return time.perf_counter() - start


def fresh(step):
    """The step, with a result of its own: a graph writes all of them to the same memory, and multi-step samplers keep
    some."""
    return lambda *args: step(*args).clone()
