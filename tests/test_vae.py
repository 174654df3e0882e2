"""vae.py: what one reads of it holds. That its numbers are diffusers' is in tests/parity; wrong inputs, memory and
seams are in tests/robust."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vae
from checkpoints import configs
from tests.small import randomise, relative_error
from vae import VAE, VAEConfig, cut_tiles, run_in_tiles

TOY = VAEConfig((8, 16, 24), 1, 12, groups=8, scaling_factor=0.5)  # latents are 4 times smaller


def random_model(config=TOY):
    torch.manual_seed(0)
    return randomise(VAE(config))


# --- Scaling --------------------------------------------------------------------------------------


def test_scaled_latents_are_the_mean_times_the_factor():
    model = random_model()
    x, noise = torch.rand(2, 3, 16, 12) * 2 - 1, torch.randn(2, 12, 4, 3)
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (2, 12, 4, 3)
    assert torch.equal(model.encode_scaled(x), mean * 0.5)
    sample = mean + (logvar / 2).exp() * noise
    assert torch.equal(model.encode_scaled(x, noise), sample * 0.5)
    assert torch.equal(model.decode_scaled(mean * 0.5), model.decode(mean))


def test_scaled_latents_are_float32_whatever_the_weights():
    model = random_model().bfloat16()
    z = model.encode_scaled(torch.zeros(1, 3, 8, 8))
    assert z.dtype == model.decode_scaled(z).dtype == torch.float32
    assert model.decode(z.bfloat16()).dtype == torch.bfloat16


# --- Any size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "side", "overlap"), [
    (16, 16, 8, 2), (23, 37, 11, 2), (9, 8, 8, 2), (8, 8, 8, 2), (64, 5, 16, 4), (7, 101, 10, 3), (17, 17, 1, 0),
    (20, 21, 8, 7),
])
def test_tiles_of_what_is_local_are_the_whole(h, w, side, overlap):
    shapes = set()

    def down(x):
        shapes.add(x.shape)
        return F.avg_pool2d(x, 8)

    x, z = torch.rand(2, 3, 8 * h, 8 * w), torch.rand(2, 4, h, w)
    torch.testing.assert_close(run_in_tiles(down, x, side, overlap, 8, 1), F.avg_pool2d(x, 8), atol=1e-6, rtol=0)
    up = torch.nn.Upsample(scale_factor=8)
    torch.testing.assert_close(run_in_tiles(up, z, side, overlap, 1, 8), up(z), atol=1e-6, rtol=0)
    assert shapes == {(2, 3, 8 * min(side, h), 8 * min(side, w))}  # one size for all


def test_weights_are_straight_ramps():
    tiles = list(cut_tiles(20 * 8, 8, 2, 8, 2))
    assert [rows.start // 8 for rows, _, _ in tiles] == [0, 6, 12]
    total = torch.zeros(40)
    for _, out, weights in tiles:
        total[out] += weights
    assert torch.equal(total, torch.ones(40))
    first, middle, last = (weights for _, _, weights in tiles)
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])  # over 2 latents of 2 pixels; the picture's own edge has none
    torch.testing.assert_close(middle, torch.cat([ramp, torch.ones(8), ramp.flip(0)]))
    assert torch.equal(first[:12], torch.ones(12)) and torch.equal(last[4:], torch.ones(12))


def watched_model():
    """A model, and a list of the shapes that its two networks are given."""
    model, shapes = random_model(replace(TOY, size=32)), []
    for network in (model.encoder, model.decoder):
        network.register_forward_pre_hook(lambda network, args: shapes.append(tuple(args[0].shape)))
    return model, shapes


def test_below_its_memory_nothing_changes():
    model, shapes = watched_model()
    x, z, noise = torch.randn(2, 3, 48, 40), torch.randn(2, 12, 12, 10), torch.randn(2, 12, 12, 10)
    encode, decode = model.estimate_bytes()
    (mean, logvar), decoded = model.encode(x), model.decode(z)
    model.memory = 2 * 48 * 40 * encode
    assert torch.equal(model.encode_scaled(x), mean / 2)
    assert torch.equal(model.encode_scaled(x, noise), (mean + (logvar / 2).exp() * noise) / 2)
    model.memory = 2 * 48 * 40 * decode
    assert torch.equal(model.decode_scaled(z / 2), decoded)
    shapes.clear()
    model.memory -= 1  # one picture still fits
    assert relative_error(model.decode_scaled(z / 2), decoded) <= 1e-5  # BLAS may sum in another order for a batch
    assert shapes == [(1, 12, 12, 10)] * 2


def test_above_its_memory_no_more_is_computed_at_once():
    model, shapes = watched_model()
    x, z = torch.randn(2, 3, 96, 160), torch.randn(2, 12, 24, 40)
    encode, decode = model.estimate_bytes()
    model.memory = 50 * 50 * encode
    assert model.encode_scaled(x).shape == (2, 12, 24, 40) and len(shapes) > 2 and len(set(shapes)) == 1
    assert 32 * 32 <= shapes[0][2] * shapes[0][3] <= 50 * 50
    shapes.clear()
    model.memory = 50 * 50 * decode
    assert model.decode_scaled(z).shape == (2, 3, 96, 160) and len(shapes) > 2 and len(set(shapes)) == 1
    assert 8 * 8 <= shapes[0][2] * shapes[0][3] <= 12.5 * 12.5


# --- Configurations -------------------------------------------------------------------------------


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(vae.CONFIGS["sd"]).parameters()) == 83_653_863


@pytest.mark.parametrize("name", ["sd", "toy"])
def test_shapes_give_the_configuration_back(name):
    want = vae.CONFIGS[name]
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VAE(want).state_dict().items()}
    shown = VAEConfig(want.channels, want.layers, want.latent_channels, want.groups)
    assert configs.vae_config_from_shapes(shapes) == shown


def test_the_size_of_tiles_is_in_the_configuration():
    toy = vae.CONFIGS["toy"]
    written = configs.vae_config_to_json(toy)
    assert configs.vae_config_from_json(written).size == toy.size == 128
    del written["sample_size"]
    assert configs.vae_config_from_json(written).size == 512
