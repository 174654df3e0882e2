"""models/xl.py: both layouts of base and refiner, in and out; what the UNet is told; the hand-over."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import clip
import sd
import unet
import vae
from checkpoints.parts import SkipInit
from models import xl
from tests import small

# ----------------------------------------------------------------------------------------------------------------------
# Files


def xl_file(folder, kind):
    model = small.stable_diffusion_xl(kind)
    save_file(small.to_original(model), folder / f"{kind}.safetensors")
    small.write_tokenizer(folder)
    return folder / f"{kind}.safetensors", model


def configurations(model):
    return [model.unet.config, model.vae.config, *[text.config for text, _ in model.readers()]]


@pytest.mark.parametrize("kind", small.XLS)
def test_single_file(tmp_path, kind):
    file, model = xl_file(tmp_path, kind)
    got = sd.load(file)
    assert configurations(got) == configurations(model)
    assert (got.xl.refines, got.xl.zeros) == (kind == "refiner", kind != "refiner")
    assert (got.size, got.vae.config.size) == (128 * 2, 1024)
    assert [tokenizer.pad for _, tokenizer in got.readers()] == ([clip.END, "!"] if got.xl.zeros else ["!"])
    assert small.same_model(got, model)
    assert not any(p.requires_grad for text, _ in got.readers() for p in text.parameters())
    half = sd.load(file, torch.float16)
    assert {text.text_model.final_layer_norm.weight.dtype for text, _ in half.readers()} == {torch.float16}


@pytest.mark.parametrize("kind", small.XLS)
def test_save_and_load(tmp_path, kind):
    model = small.stable_diffusion_xl(kind, size_width=8)
    sd.save(model, tmp_path)
    got = sd.load(tmp_path)
    assert configurations(got) == configurations(model) and got.unet.config.size_width == 8
    assert (got.xl.refines, got.xl.zeros, got.size) == (model.xl.refines, model.xl.zeros, 16)
    assert [tokenizer.pad for _, tokenizer in got.readers()] == [tokenizer.pad for _, tokenizer in model.readers()]
    assert small.same_model(got, model)


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_a_folder_that_says_little(tmp_path, kind):
    """Without its index and the UNet's configuration, folders and tensors say it."""
    model = small.stable_diffusion_xl(kind)
    sd.save(model, tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "unet/config.json").unlink()
    got = sd.load(tmp_path)
    assert configurations(got) == configurations(model)
    assert (got.xl.refines, got.xl.zeros, got.size) == (model.xl.refines, model.xl.zeros, 256)


def test_one_layout_makes_the_other(tmp_path):
    file, model = xl_file(tmp_path, "base")
    sd.save(sd.load(file), tmp_path / "folder")
    assert small.same_model(sd.load(tmp_path / "folder"), model)


def test_names_that_merged_files_have_besides(tmp_path):
    file, model = xl_file(tmp_path, "base")
    more = {"conditioner.embedders.0.transformer.text_projection.weight": torch.ones(2),
            "conditioner.embedders.0.logit_scale": torch.ones(()), "model_ema.decay": torch.ones(())}
    save_file(small.to_original(model) | more, file)
    assert small.same_model(sd.load(file), model)


@pytest.mark.parametrize("says, computed", [({}, torch.float32), ({"force_upcast": True}, torch.float32),
                                            ({"force_upcast": False}, torch.float16)])
def test_the_autoencoder_computes_in_fp32_unless_it_was_made_for_fp16(tmp_path, says, computed):
    sd.save(small.stable_diffusion_xl(), tmp_path)
    file = tmp_path / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | says))
    got = sd.load(tmp_path, torch.float16)
    assert {p.dtype for p in got.vae.parameters()} == {computed}
    assert got.unet.conv_in.weight.dtype == torch.float16
    assert {p.dtype for p in sd.load(tmp_path, torch.bfloat16).vae.parameters()} == {torch.bfloat16}


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"), SkipInit():
        networks = [unet.UNet(unet.CONFIGS["sdxl"]), unet.UNet(unet.CONFIGS["sdxl-refiner"]),
                    vae.VAE(vae.CONFIGS["sdxl"]), clip.TextEncoder(clip.CONFIGS["clip-vit-l"]),
                    clip.TextEncoder(clip.CONFIGS["openclip-bigg"])]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [2_567_463_684, 2_259_526_660, 83_653_863, 123_060_480, 694_659_840]


@pytest.mark.parametrize("name, numbers", [("sdxl", 6), ("sdxl-refiner", 5)])
def test_the_published_parts_fit(name, numbers):
    config = unet.CONFIGS[name]
    texts = [clip.CONFIGS["clip-vit-l"], clip.CONFIGS["openclip-bigg"]][0 if numbers == 6 else 1 :]
    assert config.context == sum(text.width for text in texts)
    assert config.added == 1280 + numbers * 256


# ----------------------------------------------------------------------------------------------------------------------
# What the UNet is told


def told(model, *texts, **options):
    return xl.make_conditions(model, list(texts), **options)


def test_size_and_score():
    base, refiner = small.stable_diffusion_xl(), small.stable_diffusion_xl("refiner")
    numbers = {}
    for name, model in (("base", base), ("refiner", refiner)):
        _, added = told(model, "", "cats", guided=True, size=(24, 16))
        numbers[name] = added[:, 48:].unflatten(1, (-1, 256))
    embed = lambda *values: unet.timestep_embedding(torch.tensor(values), 256)  # noqa: E731
    for row in numbers["base"]:
        assert torch.equal(row, embed(24, 16, 0, 0, 24, 16))
    for row, score in zip(numbers["refiner"], (2.5, 6.0), strict=True):
        assert torch.equal(row, embed(24, 16, 0, 0, score))
    _, added = told(base, "cats", guided=False)
    assert torch.equal(added[0, 48:].unflatten(0, (-1, 256)), embed(16, 16, 0, 0, 16, 16))


def test_no_negative_prompt_is_zeros_where_the_model_says_so():
    for kind in ("base", "refiner"):
        model = small.stable_diffusion_xl(kind)
        context, added = told(model, "", "dogs", "", "cats", guided=True)
        zeros = [not row.any() for row in context]
        assert zeros == [not row[:48].any() for row in added] == [kind == "base", False, False, False]
        assert context[2].std() > 0.1  # an empty prompt is none


def test_prompts_as_a1111_reads_them():
    model = small.stable_diffusion_xl()
    plain = told(model, "a red circle", guided=False)
    same = told(model, "a red circle", guided=False, a1111=True)
    for x, y in zip(same, plain):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    context, added = told(model, "a (red:1.5) circle", guided=False, a1111=True)
    assert small.relative_error(context, plain[0]) > 0.01
    torch.testing.assert_close(added, plain[1], rtol=1e-5, atol=1e-5)
    context, _ = told(model, "", "a circle BREAK red", guided=True, a1111=True)
    assert context.shape == (2, 154, 64 + 128) and not context[0].any()


def test_timesteps_made_ahead_are_what_the_unet_makes_of_them():
    model = small.stable_diffusion_xl()
    z, t = small.randn(2, 4, 8, 8), torch.tensor([501, 501])
    options = dict(prompts=["cats", "dogs"], guidance=3.0)
    want = model.denoiser(**options)(z, t)
    got = model.denoiser(**options, timesteps=[901, 501])(z, t)
    assert small.relative_error(got, want) <= 1e-5
    alone = model.denoiser("dogs", guidance=3.0)(z[1:], t[1:])
    assert small.relative_error(got[1:], alone) <= 1e-5


def test_without_a_tokenizer(tmp_path):
    file, _ = xl_file(tmp_path, "base")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    model = sd.load(file)
    model.decode(model.encode_image(torch.zeros(1, 3, 16, 16)))
    for ask in (model.encode_prompt, model.denoiser):
        with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt"):
            ask(["a cat"])


def test_an_unet_of_xl_beside_the_encoder_of_another_is_refused(tmp_path):
    model = small.stable_diffusion("sd1")
    model.unet = unet.UNet(replace(small.UNETS["sd1"], added=100)).requires_grad_(False)
    sd.save(model, tmp_path)
    with pytest.raises(ValueError, match="UNet is an XL's"):
        sd.load(tmp_path)
