"""common/devices.py: a fast model and a compiled one are the same model; memory that is held."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops

import sample
import sd
from common import devices
from kernels.winograd import QuickConv2d

EXAMPLES = Path(__file__).parent.parent / "examples"
MAP_EDIT = ("--image", EXAMPLES / "meadow.png", "--change-map", EXAMPLES / "gradient.png", "--prompt", "snow at night")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_fast_model_is_the_same_model(device):
    """What is done for a GPU is done here on the CPU, where it makes no difference either."""
    model, x = sd.load(sample.TOY, torch.float32), torch.rand(1, 3, 32, 32)
    z, t, context = torch.randn(1, model.unet.config.in_channels, 16, 16), torch.tensor([500]), torch.randn(1, 5, 128)
    with torch.inference_mode():
        want = model.unet(z, t, context), model.encode_image(x)
        assert devices.make_fast(model, torch.device(device)) is model
        got = model.unet(z, t, context), model.encode_image(x)
    for a, b in zip(got, want):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    conv = model.unet.mid_block.resnets[0].conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == (device == "cuda")
    assert isinstance(conv, QuickConv2d) == isinstance(model.vae.decoder.conv_in, QuickConv2d) == (device == "cpu")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its last stage, which takes minutes: what is compiled is traced, guarded, and run as it
    is. -> the functions that were compiled, with their options"""
    compiled, real = [], torch.compile

    def trace(f, mode=None, **options):
        compiled.append((f.__name__, mode, options))
        return real(f, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    # What is compiled has no quick convolutions, whose rounding is another: then neither has what it is compared with.
    monkeypatch.setattr(sample, "make_fast", lambda model, device: model)
    yield compiled
    torch._dynamo.reset()


def test_compiled_networks_give_the_same(monkeypatch):
    """Layers in place of the UNets, and a compiler that changes nothing: what is compiled, how, and that it is run."""
    traced = []
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **o: traced.append((f.__name__, mode, o)) or f)
    x = torch.randn(2, 3)
    unet, synthesizer, extractor = (torch.nn.Linear(3, 3) for _ in range(3))
    extractor.features = lambda x: extractor.bias + x
    stable, fixup = SimpleNamespace(unet=unet), SimpleNamespace(synthesizer=synthesizer, extractor=extractor)
    want = unet(x), synthesizer(x), extractor.features(x)
    assert devices.compile_unets(stable, lambda: unet(x)) > 0
    assert traced == [("forward", "reduce-overhead", {"dynamic": False})]
    devices.compile_unets(fixup, lambda: synthesizer(x))
    assert [mode for _, mode, _ in traced] == ["reduce-overhead", "reduce-overhead", None]
    assert all(map(torch.equal, (unet(x), synthesizer(x), extractor.features(x)), want))


def results(tmp_path, *argv):
    """The picture without and with --compile, of a short edit."""
    argv = [*map(str, argv), "--steps", "4", "--device", "cpu", "--precision", "fp32"]
    sample.main([*argv, "--out", str(tmp_path / "plain.png")])
    sample.main([*argv, "--compile", "--out", str(tmp_path / "compiled.png")])
    return Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "compiled.png")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--guidance", "1", "--sampler", "pndm")])  # the latter remembers results
def test_an_edit_with_a_compiled_unet_is_the_same(tmp_path, traced, capsys, more):
    plain, compiled = results(tmp_path, *MAP_EDIT, *more)
    assert not ImageChops.difference(plain, compiled).getbbox()
    assert traced == [("forward", "reduce-overhead", {"dynamic": False})]
    assert "s, with an edit of 3 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_so_is_a_magic_fixup_and_nothing_is_compiled_after_the_first_edit(tmp_path, traced, monkeypatch):
    counts = []
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a: [generate(*a), counts.append(frames())][0])
    plain, compiled = results(tmp_path, "--collage", EXAMPLES / "edits.json")
    assert not ImageChops.difference(plain, compiled).getbbox()
    assert [name for name, _, _ in traced] == ["forward", "features"]
    assert counts[1] > counts[0] and counts[2] == counts[1]  # without, compiling, compiled


def broken(graph, inputs):
    raise RuntimeError("no C++ compiler\nand a traceback")


def frames():
    return sum(torch._dynamo.utils.counters["frames"].values())


def test_a_compiled_step_gives_memory_of_its_own():
    """As with CUDA graphs, which have one memory for all results."""
    memory = torch.zeros(2)
    step = devices.copy_results(lambda x: memory.copy_(x))
    first, second = step(torch.ones(2)), step(torch.full((2,), 2.0))
    assert first.tolist() == [1, 1] and second.tolist() == [2, 2]


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_one_line(tmp_path, monkeypatch, capsys):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: real(f, backend=broken, **options))
    with pytest.raises(SystemExit) as e:
        sample.main([*map(str, MAP_EDIT), "--compile", "--out", str(tmp_path / "x.png")])
    assert e.value.code == 2
    told = capsys.readouterr().err
    assert "sample.py: error: --compile does not work here, leave it out: no C++ compiler\n" in told
    assert "raceback" not in told and not (tmp_path / "x.png").exists()


FAULTS = """
import resource
from kernels.memory import hold_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
hold_memory()
print(before, min(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's habit")
def test_held_memory_is_not_asked_for_again():
    argv, root = [sys.executable, "-c", FAULTS], EXAMPLES.parent
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10  # the least of several tries: while the heap grows, a block comes anew at times
