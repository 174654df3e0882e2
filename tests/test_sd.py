"""sd.py: every layout in, the standard folder out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clip
import sample
import sd
from checkpoints import read
from checkpoints.names import split_stable_diffusion
from checkpoints.parts import load_part, replace_vae, save_part
from common import devices
from tests import small
from tests.runs import MEADOW, fails


@pytest.mark.parametrize("kind, suffix", [
    ("sd1", ".ckpt"), ("inpainting", ".safetensors"), ("pix2pix", ".ckpt"), ("sd2", ".safetensors"),
])
def test_original_layout(tmp_path, kind, suffix):
    file, _, model = small.original_file(tmp_path, kind, suffix)
    got = sd.load(file, prediction="epsilon")
    assert (got.unet.config, got.vae.config) == (small.UNETS[kind], small.VAE)
    assert got.text.config == small.TEXTS[kind]
    assert got.size == 64 * 2
    assert got.tokenizer.pad == model.tokenizer.pad
    assert not any(p.requires_grad for part in (got.unet, got.vae, got.text) for p in part.parameters())
    assert small.same_model(got, model)
    assert all(n.dtype == torch.float32 for n in small.compute(got))
    half = sd.load(file, dtype=torch.float16)
    assert {p.dtype for part in (half.unet, half.vae, half.text) for p in part.parameters()} == {torch.float16}


def test_v_prediction_and_the_native_size(tmp_path):
    file, _, _ = small.original_file(tmp_path, "sd2", ".safetensors")
    for said, size in (("epsilon", 64 * 2), ("v_prediction", 96 * 2)):
        got = sd.load(file, prediction=said)
        assert (got.schedule.prediction, got.size) == (said, size)


def test_an_sd2_that_says_nothing_is_asked(tmp_path, monkeypatch):
    """The toy, which was trained, predicts v; what it says of the noise makes it one that predicts that."""
    toy, forward = sd.load(sample.TOY, torch.float32), sd.UNet.forward
    assert sd.ask_prediction(toy.unet) == "v_prediction"
    file, _, _ = small.original_file(tmp_path, "sd2", ".safetensors")
    assert sd.load(file).schedule.prediction == "v_prediction"  # random, so it is no epsilon
    alpha, sigma = toy.schedule.alpha_sigma(999, torch.ones(1))
    monkeypatch.setattr(sd.UNet, "forward", lambda self, z, t, c: sigma * z + alpha * forward(self, z, t, c))
    assert sd.ask_prediction(toy.unet) == sd.load(file).schedule.prediction == "epsilon"


def test_a_yaml_beside_a_file_says_what_it_predicts(tmp_path):
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".ckpt")
    torch.save(tensors | {"v_pred": torch.tensor([])}, tmp_path / "v.ckpt")
    for yaml, said in (
        ('model:\n  params:\n    parameterization: "v"\n    timesteps: 1000\n', "v_prediction"),
        ("  parameterization : v # velocity\r\n", "v_prediction"), ("    parameterization: 'eps'\n", "epsilon"),
        ("# parameterization: v\n", None), ("    parameterization: very\n", None), ("", None),
    ):
        file.with_suffix(".yaml").write_text(yaml, newline="")
        got = sd.load(file)
        assert (got.schedule.prediction, got.size) == (said or "epsilon", 64 * 2)
        file.with_suffix(".yaml").rename(tmp_path / "v.yaml")
        assert sd.load(tmp_path / "v.ckpt").schedule.prediction == (said or "v_prediction")
    (tmp_path / "v.yaml").rename(file.with_suffix(".yaml")).write_text("parameterization: v")
    assert sd.load(file, prediction="epsilon").schedule.prediction == "epsilon"


def test_a_file_says_what_it_predicts(tmp_path):
    file, tensors, _ = small.original_file(tmp_path, "sd2", ".safetensors")
    save_file(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, file)
    got = sd.load(file)
    assert (got.schedule.name, got.schedule.prediction, got.size) == ("zero_snr", "v_prediction", 96 * 2)
    save_file(tensors | {"edm_vpred.sigma_max": torch.tensor(120.0)}, file)
    with pytest.raises(ValueError, match="EDM's noise levels"):
        sd.load(file)
    save_file(tensors, file, metadata={"modelspec.prediction_type": "v"})
    assert sd.load(file).schedule.prediction == "v_prediction"
    save_file(tensors, file, metadata={"modelspec.prediction_type": "epsilon"})
    assert sd.load(file).schedule.prediction == "epsilon"


def test_weights_stay_in_the_file(tmp_path):
    """Loaded as stored, the parameters are a mapping of the file: no page of it is private memory."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs Linux")
    big = torch.randn(2**24)  # 64 MiB
    save_file({"a": big}, tmp_path / "a.safetensors")
    torch.save({"a": big}, tmp_path / "a.ckpt")

    def mapping(address):
        """-> (the file that is mapped there, the KiB of it that are private memory)"""
        here = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, *rest = line.split(maxsplit=5)
            if not first.endswith(":"):
                start, end = (int(x, 16) for x in first.split("-"))
                here, name = start <= address < end, rest[-1]
            elif here and first == "Anonymous:":
                return Path(name), int(rest[0])

    for file in ("a.safetensors", "a.ckpt"):
        tensor = read.read_tensors(tmp_path / file)["a"]
        assert torch.equal(tensor, big)
        for address in (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1):
            assert mapping(address) == ((tmp_path / file).resolve(), 0)


@pytest.mark.parametrize("kind", small.UNETS)
def test_save_and_load(tmp_path, kind):
    model = small.stable_diffusion(kind)
    sd.save(model, tmp_path)
    got = sd.load(tmp_path)
    assert small.same_model(got, model)
    assert (got.unet.config, got.vae.config, got.text.config) == (small.UNETS[kind], small.VAE, small.TEXTS[kind])
    assert got.size == 16 and got.tokenizer.vocab == small.VOCAB and got.tokenizer.pad == model.tokenizer.pad
    sd.save(got, tmp_path, dtype=torch.float16)  # over the very files that `got` is a mapping of
    assert small.same_model(got, model)
    assert sd.load(tmp_path, torch.float16).unet.conv_in.weight.dtype == torch.float16
    assert not [f for f in tmp_path.rglob(".*")]
    part = load_part(tmp_path / "vae", "vae", dtype=torch.float32)
    assert small.relative_error(part.decode(torch.ones(1, 4, 4, 4)), model.vae.decode(torch.ones(1, 4, 4, 4))) < 1e-2


@pytest.mark.parametrize("stored", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, "mixed"])
def test_the_precision_of_a_cpu_unless_said(tmp_path, stored):
    """Half precision is slow there and fp8 is no arithmetic; tensors of several do not compute at all."""
    tensors = small.to_original(small.stable_diffusion())
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor.is_floating_point():
            tensors[name] = tensor.to((torch.float16, torch.float32)[i % 2] if stored == "mixed" else stored)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    small.write_tokenizer(tmp_path)
    got = sd.load(tmp_path / "model.safetensors")
    assert {p.dtype for part in (got.unet, got.vae, got.text) for p in part.parameters()} == {torch.float32}
    assert all(x.isfinite().all() for x in small.compute(got))


def test_the_precision_of_parts_that_differ(tmp_path):
    model = small.stable_diffusion()
    sd.save(model, tmp_path, torch.float16)
    save_part(model.text, tmp_path / "text_encoder")  # fp32 beside fp16
    for dtype in (None, torch.bfloat16):
        got = sd.load(tmp_path, dtype)
        assert got.text.text_model.final_layer_norm.weight.dtype == got.unet.conv_in.weight.dtype
        got.denoiser(["a blue circle"])(torch.zeros(1, 4, 8, 8), torch.tensor([500]))
    assert torch.equal(sd.load(tmp_path).unet.conv_in.weight, model.unet.conv_in.weight.half().float())


@pytest.mark.parametrize("device, stored, computed", [
    ("cuda", {torch.float16}, torch.float16), ("cuda", {torch.float32}, torch.float32),
    ("cuda", {torch.float16, torch.float32}, torch.bfloat16), ("cuda", {torch.float8_e5m2}, torch.bfloat16),
    ("mps", {torch.bfloat16}, torch.float16), ("cpu", {torch.float16}, torch.float32),
])
def test_the_precision_of_other_devices(monkeypatch, device, stored, computed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device("cuda"): (8, 0)}.get)
    assert devices.choose_stored(stored, device) == computed


def test_another_autoencoder(tmp_path):
    """From its own folder, a whole model's, a file of it alone or of a whole model, in either layout."""
    wanted, other = small.stable_diffusion("sd2"), small.stable_diffusion("sd1")
    small.randomise(wanted.vae, seed=5)
    sd.save(wanted, tmp_path / "model")
    original = small.to_original(wanted, openclip=True)
    alone = {n.removeprefix("first_stage_model."): x for n, x in original.items() if n.startswith("first_stage_model.")}
    save_file(alone, tmp_path / "alone.safetensors")
    save_file(original, tmp_path / "whole.safetensors")
    folder = tmp_path / "model/vae"
    for path in (tmp_path / "model", folder, folder / "diffusion_pytorch_model.safetensors",
                 tmp_path / "alone.safetensors", tmp_path / "whole.safetensors"):
        model = small.stable_diffusion("sd1")
        replace_vae(model, path)
        assert model.vae.config == wanted.vae.config
        z = torch.ones(1, 4, 4, 4)
        assert torch.equal(model.decode(z), wanted.decode(z))
        assert small.same_weights(model.unet, other.unet)

    toy = sd.load(sample.TOY)
    with pytest.raises(ValueError, match="latents of 4 channels"):
        replace_vae(toy, folder)


def test_a_file_without_an_autoencoder(tmp_path):
    """It takes another's, in any layout; what an autoencoder's own training left beside it is no part of it."""
    model = small.stable_diffusion()
    tensors = small.to_original(model)
    own = {n.removeprefix("first_stage_model."): x for n, x in tensors.items() if n.startswith("first_stage_model.")}
    rest = {n: x for n, x in tensors.items() if not n.startswith("first_stage_model.")}
    save_file(rest, tmp_path / "it.ckpt")
    small.write_tokenizer(tmp_path)
    save_part(model.vae, tmp_path / "vae")
    more = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": own | more}, tmp_path / "vae.ckpt")
    for vae in ("vae", "vae.ckpt"):
        got = sd.load(tmp_path / "it.ckpt", vae=tmp_path / vae)
        assert small.same_model(got, model)
        replace_vae(got, tmp_path / vae)
        assert small.same_model(got, model)
    with pytest.raises(ValueError, match=r"no tensors first_stage_model\.\*; .*--vae names another"):
        sd.load(tmp_path / "it.ckpt")


def test_averages_in_a_file_are_told(tmp_path):
    tensors = small.to_original(small.stable_diffusion())
    save_file(tensors | {"model_ema.diffusion_modelout2bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="moving average of the UNet as well"):
        sd.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("layers, projection, read", [(23, False, 23), (24, False, 23), (24, True, 23), (3, True, 2)])
def test_the_layers_of_an_sd2(layers, projection, read):
    """A file that was converted from Hugging Face's folder has 23, and no projection: all of them are read."""
    model = small.stable_diffusion("sd2")
    model.text = clip.TextEncoder(replace(small.TEXTS["sd2"], layers=layers))
    tensors = small.to_original(model, openclip=True)
    if not projection:
        del tensors["cond_stage_model.model.text_projection"]
    text = split_stable_diffusion("it", tensors)[0]["text_encoder"]
    assert {int(name.split(".")[3]) for name in text if ".layers." in name} == set(range(read))


def test_no_tokenizer(tmp_path, monkeypatch, capsys):
    save_file(small.to_original(small.stable_diffusion()), tmp_path / "model.safetensors")
    got = sd.load(tmp_path / "model.safetensors")
    got.decode(got.encode_image(torch.zeros(1, 3, 16, 16)))
    command = "--weights", tmp_path / "model.safetensors", "--image", MEADOW, "--strength", 1, "--prompt", "a cat"
    monkeypatch.setattr(sd.StableDiffusion, "encode_image", None)  # it is told before that
    assert "needs a tokenizer" in fails(capsys, *command)
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt") as info:
        got.encode_prompt(["a cat"])
    assert str(tmp_path) in str(info.value) and clip.ARCHIVE in str(info.value)
    sd.save(small.stable_diffusion(), tmp_path / "folder")
    for f in (tmp_path / "folder" / "tokenizer").iterdir():
        f.unlink()
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt") as info:
        sd.load(tmp_path / "folder").encode_prompt(["a cat"])
    assert str(tmp_path / "folder" / "tokenizer") in str(info.value)
