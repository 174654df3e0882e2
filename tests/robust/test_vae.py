"""vae.py: wrong shapes, and pictures too large for the memory: what is estimated of it, and what tiles look like."""

from dataclasses import replace

import pytest
import torch

import sample
import sd
import vae
from reproduce.dd_tables import peak_memory
from tests.small import randomise
from toy import world
from vae import VAE, VAEConfig, cut_tiles

SMALL = VAEConfig((8, 16, 24), 1, 12, groups=8)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 8, 6), (3, 8, 8), (1, 1, 8, 8)])
def test_a_wrong_shape_is_refused(shape):
    model = VAE(SMALL)
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
    model, shapes = randomise(VAE(replace(SMALL, scaling_factor=0.5, size=32))), []
    model.memory = 0
    for network in (model.encoder, model.decoder):
        network.register_forward_pre_hook(lambda network, args: shapes.append(tuple(args[0].shape)))
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
