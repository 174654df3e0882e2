"""Where a program computes, in what precision, and how a model is made fast there.

    device = choose_device("auto")               cuda, mps or cpu
    dtype = choose_precision("auto", device)     half precision where that is faster
    make_fast(model, device)                     the fastest way for each layer, at once
    seconds = compile_unets(model, run)          faster still, after minutes of compiling
"""

import time

import torch

from kernels.winograd import quicken

# -------------------------------------------------------------------------------------------------
# Device and precision


def choose_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. ValueError for one that cannot be used here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose auto, cpu, cuda or mps")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({why})") from None
    return torch.device(name)


def choose_precision(name, device):
    """auto, fp32, fp16, bf16 -> dtype. auto: half precision where that is faster."""
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.float16
    # Without AMX tiles, bf16 instructions are slower than single precision: python -m bench unet
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def choose_stored(stored, device):
    """The precision for weights in these dtypes if nobody says one: as stored, where they have one
    in which the device computes well. Half precision on a CPU may take 14 times as long."""
    device = torch.device(device)
    half = choose_precision("auto", device)
    well = {torch.float32, half} | ({torch.float16} if device.type == "cuda" else set())
    if len(stored) == 1 and stored <= well:
        return next(iter(stored))
    return torch.float32 if device.type == "cpu" else half


# -------------------------------------------------------------------------------------------------
# Fast models: a StableDiffusion or a MagicFixup, changed in place


def make_fast(model, device):
    """-> the model, with what costs nothing but memory: quick convolutions on a CPU; on a GPU
    weights in the order in which tensor cores read them."""
    for network in (model.vae, *find_unets(model)):
        if device.type == "cpu":
            quicken(network, keep=network is not model.vae)  # the autoencoder runs once or twice
        elif device.type == "cuda":
            network.to(memory_format=torch.channels_last)
    return model


def find_unets(model):
    """-> the UNets of either model. A Magic Fixup may be without an extractor."""
    parts = (getattr(model, name, None) for name in ("unet", "synthesizer", "extractor"))
    return [part for part in parts if part is not None]


def compile_unets(model, run):
    """Let PyTorch compile the UNets -> the seconds that it took, one run included.

    run  a function without arguments: an edit, during which the compiling happens. Each size of
         batch that comes later must come in it

    ValueError, one line, where no compiler works.
    """
    for network in find_unets(model):
        if network is getattr(model, "extractor", None):
            # Many timesteps in one batch, whose size varies: a CUDA graph gains nothing
            network.features = torch.compile(network.features)
        else:
            # Many small kernels: they are fused, recorded and sent again as one CUDA graph, whose
            # shapes must not change
            step = torch.compile(network.forward, mode="reduce-overhead", dynamic=False)
            network.forward = copy_results(step)
    start = time.perf_counter()
    try:
        run()
    except torch._dynamo.exc.TorchDynamoException as e:
        why = str(getattr(e, "inner_exception", e)) or type(e).__name__
        first_line = why.splitlines()[0]
        raise ValueError(f"--compile does not work here, leave it out: {first_line}") from None
    return time.perf_counter() - start


def copy_results(step):
    """The same function with results of their own: a CUDA graph writes all of them to the same
    memory, and multi-step samplers keep some."""
    return lambda *args: step(*args).clone()
