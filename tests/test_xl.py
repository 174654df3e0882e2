"""models/xl.py: both layouts of base and refiner, in and out; what the UNet is told; the hand-over."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import clip
import diffdiff
import diffusion
import sample
import samplers
import sd
import unet
import vae
from checkpoints import configs, names
from checkpoints.parts import SkipInit
from models import xl
from tests import small

# --- Files ----------------------------------------------------------------------------------------


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


def test_names_that_merged_files_have_besides(tmp_path):
    file, model = xl_file(tmp_path, "base")
    more = {"conditioner.embedders.0.transformer.text_projection.weight": torch.ones(2),
            "conditioner.embedders.0.logit_scale": torch.ones(()), "model_ema.decay": torch.ones(())}
    tensors = small.to_original(model) | more
    save_file(tensors, file)
    assert small.same_model(sd.load(file), model)

    # What diffusers' converter wrote until 2024 has the projection as Hugging Face has it.
    projection = "conditioner.embedders.1.model.text_projection"
    tensors[f"{projection}.weight"] = tensors.pop(projection).T.contiguous()
    save_file(tensors, file)
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


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_names_and_shapes_at_full_size(kind):
    """What the published files hold makes the published configurations."""
    wanted = [clip.CONFIGS["clip-vit-l"], clip.CONFIGS["openclip-bigg"]]
    with torch.device("meta"), SkipInit():
        texts = [clip.TextEncoder(config) for config in wanted]
        u = unet.UNet(unet.CONFIGS["sdxl" if kind == "base" else "sdxl-refiner"])
        model = sd.StableDiffusion(u, vae.VAE(vae.CONFIGS["sdxl"]), texts[1], None, None, 1024)
        model.xl = xl.XL(texts[0] if kind == "base" else None, None, True)
        parts, _ = names.split_stable_diffusion("it", small.to_original(model))
    shapes = {part: {name: tuple(x.shape) for name, x in tensors.items()} for part, tensors in parts.items()}
    assert configs.unet_config_from_shapes(shapes["unet"]) == model.unet.config
    assert replace(configs.vae_config_from_shapes(shapes["vae"]), **xl.VAE) == model.vae.config
    for part, config in zip(("text_encoder", "text_encoder_2"), wanted):
        if part in parts:  # which layer is read, tensors do not say
            found = configs.text_config_from_shapes(shapes[part])
            assert replace(found, skip_last=config.skip_last, final_norm=config.final_norm) == config
    xl.check_fit("it", model)
    assert model.unet.config.context == sum(text.config.width for text, _ in model.readers())


# --- What the UNet is told ------------------------------------------------------------------------


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


def test_a_folder_without_one_of_its_tokenizers(tmp_path):
    sd.save(small.stable_diffusion_xl(), tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer/ and {tmp_path}/tokenizer_2/"):
        sd.load(tmp_path).encode_prompt("cats")


def test_an_unet_of_xl_beside_the_encoder_of_another_is_refused(tmp_path):
    model = small.stable_diffusion("sd1")
    model.unet = unet.UNet(replace(small.UNETS["sd1"], added=100)).requires_grad_(False)
    sd.save(model, tmp_path)
    with pytest.raises(ValueError, match="UNet is an XL's"):
        sd.load(tmp_path)


# --- Base and refiner: denoisers that take every pixel by itself ----------------------------------

K, SWITCH = 10, 0.75  # the base runs t = 901 .. 301: seven steps, since 201 < 250
SCHEDULE = diffusion.Schedule()
BASE, REFINER = small.mixture(SCHEDULE), small.mixture(SCHEDULE, means=(0.3, 2.0), std=0.3)
BOTH = xl.hand_over(BASE, REFINER, SWITCH)


def run_under(denoise, mu, name="euler", options=None, **more):
    sampler = samplers.make_sampler(name, SCHEDULE, K, **(options or {}))
    step_noise = samplers.make_step_noise(small.SHAPE[1:], [1, 2])
    return diffdiff.differential_diffusion(denoise, Z_INIT, mu, sampler, NOISE, step_noise=step_noise, **more)


Z_INIT, NOISE = small.randn(*small.SHAPE, seed=3), small.randn(*small.SHAPE, seed=4)
MAP = torch.rand(2, 1, *small.SHAPE[2:], generator=torch.Generator().manual_seed(5))


def test_who_runs_which_step():
    seen = []
    both = xl.hand_over(lambda z, t: seen.append(("base", int(t[0]))) or BASE(z, t),
                        lambda z, t: seen.append(("refiner", int(t[0]))) or REFINER(z, t), 0.8)
    run_under(both, torch.zeros(1, 1))
    assert seen == [("base" if t >= 200 else "refiner", t) for t in range(901, 0, -100)]
    seen.clear()
    run_under(both, torch.full((1, 1), 0.8))  # the steps that the map overwrites are skipped
    assert seen == [("refiner", 101), ("refiner", 1)]
    for switch, who in ((0, "refiner"), (1, "base")):
        seen.clear()
        alone = xl.hand_over(lambda z, t: seen.append("base") or BASE(z, t),
                             lambda z, t: seen.append("refiner") or REFINER(z, t), switch)
        run_under(alone, torch.zeros(1, 1))
        assert set(seen) == {who}
    with pytest.raises(ValueError, match="0 .. 1, not 2"):
        xl.hand_over(BASE, REFINER, 2)
    with pytest.warns(UserWarning, match="of 4 steps none is the refiner's, after 0.8"):
        xl.hand_over(BASE, REFINER, 0.8, [999, 749, 499, 249])


@pytest.mark.parametrize("name, options", small.EVERY_SAMPLER)
def test_skipping_and_nesting_hold_across_the_switch(name, options):
    """Skipped steps have no effect; a pixel goes as under a constant map of its own value, whoever starts it."""
    mu = (0.35 + 0.6 * MAP).round(decimals=1)
    z = run_under(BOTH, mu, name, options)
    torch.testing.assert_close(z, run_under(BOTH, mu, name, options, skip=False), rtol=1e-5, atol=1e-5)
    values = mu.unique().tolist()
    assert min(values) < SWITCH < max(values)
    for value in values:
        alone = run_under(BOTH, torch.full_like(mu, value), name, options)
        here = (mu == value).expand_as(z)
        torch.testing.assert_close(z[here], alone[here], rtol=1e-5, atol=1e-5)
    late = (mu >= 0.8).expand_as(z)  # the refiner's from their first step on
    torch.testing.assert_close(z[late], run_under(REFINER, mu, name, options)[late], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(z[~late], run_under(REFINER, mu, name, options)[~late], atol=1e-2)


def test_an_edit_with_a_refiner():
    base, refiner = small.stable_diffusion_xl(), small.stable_diffusion_xl("refiner")
    picture, mu = small.randn(1, 3, 16, 24).clamp(-1, 1), torch.linspace(0, 1, 24).expand(1, 1, 16, 24)
    options = dict(sampler="euler", steps=5, guidance=3.0)
    plain = sample.edit(base, "cats", picture, mu, **options)
    both = sample.edit(base, "cats", picture, mu, **options, refiner=refiner)
    assert torch.equal(sample.edit(base, "cats", picture, mu, **options, refiner=base), plain)
    assert torch.equal(sample.edit(base, "cats", picture, mu, **options, refiner=refiner, switch=1), plain)
    assert not torch.allclose(both, plain, atol=1e-2)
    white = torch.ones(1, 1)
    kept = sample.edit(base, "cats", picture, white, **options, refiner=refiner)
    assert torch.equal(kept, base.decode(base.encode_image(picture)) / 2 + 0.5)
    drawn = sample.edit(base, "cats", size=(24, 16), **options, refiner=refiner)
    assert drawn.shape == (1, 3, 16, 24)
    two = sample.edit(base, ["cats", "dogs"], picture, mu, **options, refiner=refiner)
    torch.testing.assert_close(two[:1], both, rtol=1e-4, atol=1e-4)


def test_an_inpainting_base():
    base, refiner = small.stable_diffusion_xl("xl inpainting"), small.stable_diffusion_xl("refiner")
    picture, repaint = small.randn(1, 3, 16, 16).clamp(-1, 1), torch.zeros(1, 1, 16, 16)
    repaint[..., 8:] = 1
    options = dict(sampler="euler", steps=3, repaint=repaint)
    x = sample.edit(base, "cats", picture, 1 - repaint, **options, refiner=refiner)
    assert x.isfinite().all() and not torch.equal(x, sample.edit(base, "cats", picture, 1 - repaint, **options))
