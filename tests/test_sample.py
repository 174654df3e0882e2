"""sample.py's `edit` and `fixup`, on the shipped toy and a Magic Fixup made of it: what holds whatever the weights."""

import warnings

import pytest
import torch
from PIL import Image

import collage
import diffdiff
import sample
import sd
import unet
from common.pictures import picture_to_tensor
from tests.runs import MEADOW, black_and_white, random_fixup


@pytest.fixture(scope="module")
def toy():
    return sd.load(sample.TOY, torch.float32)


@pytest.fixture(scope="module")
def fixer(toy):
    return random_fixup(toy)


@pytest.fixture(scope="module")
def meadow():
    return picture_to_tensor(Image.open(MEADOW), (64, 64))


@pytest.fixture(scope="module")
def moved(meadow):
    """A block of the meadow moved to the right -> coarse (1, 3, 64, 64), its hole filled; mask (1, 1, 64, 64)"""
    coarse, mask = meadow.clone(), torch.ones(1, 1, 64, 64)
    coarse[..., 30:50, 35:55] = coarse[..., 30:50, 10:30]
    mask[..., 30:50, 10:30] = 0
    pixels = ((coarse[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    filled = collage.fill_holes(pixels, mask[0, 0].numpy() == 0)
    return torch.from_numpy(filled).permute(2, 0, 1)[None] / 127.5 - 1, mask


@pytest.fixture
def decoded(monkeypatch):
    """-> a list that fills with the latents that are decoded"""
    seen = []
    for kind in (sample.sd.StableDiffusion, sample.mfx.MagicFixup):
        decode = kind.decode
        monkeypatch.setattr(kind, "decode", lambda self, z, decode=decode: seen.append(z.clone()) or decode(self, z))
    return seen


def half_white():
    """Black, a ramp, and the right half white: (1, 1, 64, 64)"""
    return ((torch.arange(64.0) * 16 - 256) / 255).clamp(0, 1).expand(1, 1, 64, 64)


@torch.inference_mode()
def round_trip(model, x):
    """-> the latent, the picture in [0, 1]"""
    z = model.encode_image(x)
    return z, model.decode(z) / 2 + 0.5


# --- Differential Diffusion -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "pndm"])  # of all: tests/test_diffdiff.py
def test_white_latents_stay_and_black_ones_change(toy, meadow, sampler, decoded):
    """Bit for bit. In pixels, the decoder's norms and its attention look at the whole picture, so that white ones
    follow a little."""
    z_init, back = round_trip(toy, meadow)
    x = sample.edit(toy, "snow at night", meadow, half_white(), sampler=sampler, steps=4)
    (black, white), (black_before, white_before) = black_and_white(decoded[-1]), black_and_white(z_init)
    assert torch.equal(white, white_before) and (black - black_before).abs().mean() > 0.5
    change = 255 * (x.clamp(0, 1) - back).abs().mean((0, 1, 2))
    assert change[-32:].mean() < 10 < 25 < change[:16].mean()


def test_a_white_map_costs_no_step(toy, meadow, decoded, monkeypatch):
    z_init, _ = round_trip(toy, meadow)
    monkeypatch.setattr(unet.UNet, "forward", None)  # calling it would be an error
    sample.edit(toy, "snow at night", meadow, torch.ones(1, 1, 64, 64), steps=4)
    assert torch.equal(decoded[-1], z_init)


def test_blending_tells_strengths_between_two_steps_apart(toy, meadow, decoded):
    """At 1/4 and 1/2 it is as without; without it, what lies between them is as one of them (Algorithm 2's L)."""
    for mu in (0.25, 0.375, 0.5):
        for blend in (False, True):
            change_map = torch.full((1, 1, 128, 128), mu)
            sample.edit(toy, "snow at night", meadow, change_map, steps=4, guidance=1, blend=blend)
    low, low_blended, between, between_blended, high, high_blended = decoded
    assert torch.equal(between, high) and not torch.equal(low, high)
    for a, b in ((low, low_blended), (high, high_blended)):
        torch.testing.assert_close(a, b)
    z_init = toy.encode_image(meadow)
    changes = [(z - z_init).abs().mean() for z in (low, between_blended, high)]
    assert changes[0] > changes[1] > changes[2]


def test_the_progress_bar_has_as_many_steps_as_are_run(toy, meadow, monkeypatch):
    bars, tqdm = [], sample.tqdm
    monkeypatch.setattr(sample, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    half = torch.full((1, 1, 64, 64), 0.5)
    sample.edit(toy, "snow", meadow, half, steps=4)
    sample.edit(toy, "snow", meadow, half, steps=4, skip=False)
    assert [(bar.n, bar.total) for bar in bars] == [(2, 2), (4, 4)]


def test_several_prompts_seeds_and_maps_are_each_as_if_alone(toy, meadow, decoded):
    prompts, seeds = ["snow at night", "a red ball", "sand at sunset"], [3, 4, 5]
    maps = torch.stack([torch.zeros(1, 64, 64), torch.full((1, 64, 64), 0.35), half_white()[0]])
    sample.edit(toy, prompts, meadow, maps, steps=4, seed=seeds, negative=["", "snow", "grass"], sampler="ddpm")
    together = torch.cat(decoded)
    for j, alone in enumerate(together):
        decoded.clear()
        sample.edit(toy, prompts[j], meadow, maps[j : j + 1], steps=4, seed=seeds[j],
                    negative=["", "snow", "grass"][j], sampler="ddpm")
        assert (decoded[0] - alone).abs().max() < 1e-3
    assert (together[0] - together[1]).abs().mean() > 0.1


@pytest.mark.parametrize("wrong, name", [
    ({"prompt": []}, "prompt "), ({"prompt": ["a", 3]}, "prompt "), ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "pro"),
    ({"seed": []}, "seed"), ({"prompt": ["a", "b"], "negative": ["c", "d", "e"]}, "negative"),
    ({"prompt": ["a", "b"], "picture": torch.zeros(3, 3, 128, 128)}, "prompt"),
    ({"picture": torch.zeros(1, 3, 128, 128), "change_map": torch.zeros(1, 3, 128, 128)}, "change_map"),
    ({"picture": torch.zeros(1, 3, 128, 128), "change_map": torch.zeros(3, 128, 128)}, "change_map"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_named(toy, wrong, name):
    with pytest.raises(ValueError, match="^" + name):
        sample.edit(toy, **{"prompt": "snow", "steps": 1} | wrong)


def overflowing(factor):
    """The toy, large inside its autoencoder; the norms that follow take the factor out again."""
    hot = sd.load(sample.TOY, torch.float32)
    for network in (hot.vae.decoder.up_blocks[-1], hot.vae.encoder.down_blocks[-1]):
        for p in network.resnets[0].conv1.parameters():
            p.data *= factor / p.abs().max()
    return hot


@pytest.mark.parametrize("factor", [3e4, 1e5])  # activations overflow; and the weights themselves
def test_an_autoencoder_that_overflows_goes_on_in_single_precision(tmp_path, meadow, factor):
    hot = overflowing(factor)
    sd.save(hot, tmp_path)
    back = hot.decode(hot.encode_image(meadow))
    half = sd.load(tmp_path, torch.float16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x = sample.edit(half, "snow", meadow, torch.ones(1, 1, 64, 64), steps=1)
    assert (x - (back / 2 + 0.5)).abs().max() < 0.05 and len(said) == (factor < 65504)
    assert all("overflows in torch.float16: it goes on in single precision" in str(w.message) for w in said)
    z = torch.full((1, hot.vae.config.latent_channels, 4, 4), torch.nan)
    assert hot.vae.half().decode_scaled(z).isnan().all()  # which is not the autoencoder's fault
    assert hot.vae.quant_conv.weight.dtype == torch.float16


# --- Magic Fixup ----------------------------------------------------------------------------------


def test_an_edit_is_magic_fixup_and_so_is_a_black_map(fixer, meadow, moved, decoded):
    """One code path, and the paper's sampling loop: noise, step noise and the reference's noise included."""
    coarse, mask = moved
    for options in ({}, {"change_map": torch.zeros(1, 1, 64, 64)}, {"skip": False}):
        sample.fixup(fixer, meadow, coarse, mask, seeds=[4], steps=4, **options)
    with torch.inference_mode():
        I, I_coarse = fixer.encode_image(meadow), fixer.encode_image(coarse)
        want = fixer.sample(I, I_coarse, diffdiff.down_sample(mask, I.shape[-2:]), seeds=[4], steps=4)
    assert len(decoded) == 3 and all(torch.equal(z, want) for z in decoded)


@pytest.mark.parametrize("sampler", ["ddpm", "pndm"])  # of all: tests/test_diffdiff.py
def test_white_stays_as_it_is_in_the_edit(fixer, meadow, moved, sampler, decoded):
    I_coarse, _ = round_trip(fixer, moved[0])
    decoded.clear()
    x = sample.fixup(fixer, meadow, *moved, half_white(), sampler=sampler, seeds=[0, 1], steps=4)
    z = torch.cat(decoded)
    (black, white), (black_before, white_before) = black_and_white(z), black_and_white(I_coarse)
    assert x.shape == (2, 3, 64, 64) and torch.equal(white, white_before.expand(2, -1, -1, -1))
    assert (black - black_before).abs().mean() > 0.2 and (z[0] - z[1]).abs().mean() > 0.03
