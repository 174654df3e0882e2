"""vae.py: what one reads of it holds; wrong shapes; pictures too large for the memory, its estimate and the tiles.
That its numbers are diffusers' is in tests/parity."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sample
import sd
import vae
from checkpoints import configs
from reproduce.dd_tables import peak_memory
from tests.small import randomise, relative_error
from toy import world
from vae import VAE, VAEConfig, cut_tiles, run_in_tiles

TOY = VAEConfig((8, 16, 24), 1, 12, groups=8, scaling_factor=0.5)  # latents are 4 times smaller


def random_model(config=TOY):
    torch.manual_seed(0)
    return randomise(VAE(config))


# --- Scaling --------------------------------------------------------------------------------------


def test_scaled_latents_are_the_mean_times_the_factor():
    model = random_model()
    x = torch.rand(2, 3, 16, 12) * 2 - 1
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (2, 12, 4, 3)
    assert torch.equal(model.encode_scaled(x), mean * 0.5)
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
    x, z = torch.randn(2, 3, 48, 40), torch.randn(2, 12, 12, 10)
    encode, decode = model.estimate_bytes()
    (mean, _), decoded = model.encode(x), model.decode(z)
    model.memory = 2 * 48 * 40 * encode
    assert torch.equal(model.encode_scaled(x), mean / 2)
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


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 8, 6), (3, 8, 8), (1, 1, 8, 8)])
def test_a_wrong_shape_is_refused(shape):
    model = VAE(TOY)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.zeros(shape))
    model.memory = 0
    for other in ((1, 3, 64, 90), (1, 1, 64, 64)):  # in tiles, too
        with pytest.raises(ValueError, match="multiples of 4"):
            model.encode_scaled(torch.zeros(other))


# --- Memory ---------------------------------------------------------------------------------------


def exaggeration(model, x, z):
    """The estimates of `encode` and `decode` over what is alive at one time in truth."""
    truth = peak_memory(lambda: model.encode(x)), peak_memory(lambda: model.decode(z))
    return [x[0, 0].numel() * estimate / true for estimate, true in zip(model.estimate_bytes(), truth)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_memory_at_full_size(dtype):
    """On the meta device, whose tensors have sizes and no content."""
    with torch.device("meta"):
        model = VAE(vae.CONFIGS["sd"]).to(dtype).requires_grad_(False)
        x, z = torch.empty(1, 3, 512, 512, dtype=dtype), torch.empty(1, 4, 64, 64, dtype=dtype)
    encode, decode = exaggeration(model, x, z)
    assert 0.7 <= encode <= 1.5 and 0.7 <= decode <= 1.5


def test_tiles_have_a_smallest_size_whatever_the_memory():
    model, shapes = watched_model()
    model.memory = 0
    decoded = model.decode_scaled(model.encode_scaled(torch.randn(1, 3, 36, 100)))
    assert decoded.shape == (1, 3, 36, 100) and decoded.isfinite().all()
    assert set(shapes) == {(1, 3, 32, 32), (1, 12, 8, 8)}


# --- Seams ----------------------------------------------------------------------------------------


def jump(error, edges):
    """How much the error changes from column to column at these edges, in terms of its mean change."""
    change = error.diff(dim=3).abs().mean((0, 1, 2))
    return (change[[edge - 1 for edge in edges]].mean() / change.mean()).item()


def psnr(a, b):
    """In dB, of pictures in [-1, 1]."""
    return (20 * (2 / (a - b).square().mean().sqrt()).log10()).item()


# In pixels; measured: at least 41 and 42 dB, 0.09 and 0.03 of the latents, jumps of at most 1.1 and 1.4
TILES = (128, 39, 0.12), (192, 40, 0.04)


@pytest.mark.parametrize(("scenes", "tiles"), [(1, TILES[:1]), pytest.param(2, TILES, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_tiles_of_the_toy_have_no_seams(scenes, tiles):
    """Pictures twice as wide and high as what it was trained on, in 3 x 3 tiles and in 2 x 2 larger ones, against the
    whole. Four tiles put side by side show what a seam is."""
    toy = sd.load(sample.TOY, torch.float32).vae
    f = toy.config.factor
    assert toy.config.size == 128
    x = world.render(world.random_scenes(scenes, torch.Generator().manual_seed(5)), 256).image * 2 - 1
    z = toy.encode_scaled(x)
    whole = toy.decode_scaled(z)
    rows = [torch.cat([toy.decode_scaled(part) for part in row.split(128 // f, 3)], 3) for row in z.split(128 // f, 2)]
    assert jump(torch.cat(rows, 2) - whole, {128}) >= 20  # 34 and 56 measured
    for side, least_psnr, most_off in tiles:
        toy.memory = side**2 * toy.estimate_bytes()[1]
        faded, off = toy.decode_scaled(z), (toy.encode_scaled(x) - z).norm() / z.norm()
        tiles = cut_tiles(256 // f, side // f, side // f // 4, 1, f)
        edges = {f * edge for tile, _, _ in tiles for edge in (tile.start, tile.stop)}
        assert psnr(faded, whole) >= least_psnr and off <= most_off
        assert jump(faded - whole, edges - {0, 256}) <= 2
