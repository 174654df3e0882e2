"""vae.py against diffusers' AutoencoderKL, on random weights at small widths; and its tiles against the whole."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sample
import sd
import vae
from checkpoints import configs
from kernels.winograd import quicken
from reproduce.dd_costs import peak_memory
from toy import world as toyworld
from vae import VAE, VAEConfig, cuts, tiled

SMALL = {"sd": VAEConfig((32, 64, 64, 96)), "toy": VAEConfig((8, 16, 24), 1, 12, 8)}


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = VAE(config).eval().requires_grad_(False)
    for p in model.parameters():  # every bias and norm gets a value of its own
        p += 0.05 * torch.randn(p.shape)
    return model


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", SMALL)
def test_same_numbers_as_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    c = SMALL[name]
    model, n = random_model(c), len(c.channels)
    peer = diffusers.AutoencoderKL(
        latent_channels=c.latent_channels, block_out_channels=c.channels, layers_per_block=c.layers,
        norm_num_groups=c.groups, down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
    ).eval()
    peer.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4 * c.factor, 3 * c.factor)
    mean, logvar = model.encode(x)
    posterior = peer.encode(x).latent_dist
    assert mean.shape == logvar.shape == (2, c.latent_channels, 4, 3)
    assert relative_error(mean, posterior.mean) <= 1e-4
    assert relative_error(logvar, posterior.logvar) <= 1e-4
    decoded = model.decode(mean)
    assert decoded.shape == x.shape
    assert relative_error(decoded, peer.decode(mean).sample) <= 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 8, 6), (3, 8, 8), (1, 1, 8, 8)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        random_model(SMALL["toy"]).encode(torch.zeros(shape))


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(vae.CONFIGS["sd"]).parameters()) == 83_653_863


@pytest.mark.parametrize("name", ["sd", "toy"])
def test_shapes_give_the_configuration_back(name):
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VAE(vae.CONFIGS[name]).state_dict().items()}
    got, want = configs.vae_config_from_shapes(shapes), vae.CONFIGS[name]
    assert got == VAEConfig(want.channels, want.layers, want.latent_channels, want.groups)


# ---------------------------------------------------------------------------------------------------------------------
# Any size


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
    torch.testing.assert_close(tiled(down, x, side, overlap, 8, 1), F.avg_pool2d(x, 8), atol=1e-6, rtol=0)
    up = torch.nn.Upsample(scale_factor=8)
    torch.testing.assert_close(tiled(up, z, side, overlap, 1, 8), up(z), atol=1e-6, rtol=0)
    assert shapes == {(2, 3, 8 * min(side, h), 8 * min(side, w))}  # one size for all


def test_weights_are_straight_ramps():
    tiles = list(cuts(20 * 8, 8, 2, 8, 2))
    assert [rows.start // 8 for rows, _, _ in tiles] == [0, 6, 12]
    total = torch.zeros(40)
    for _, out, weights in tiles:
        total[out] += weights
    assert torch.equal(total, torch.ones(40))
    first, middle, last = (weights for _, _, weights in tiles)
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])  # over 2 latents of 2 pixels; the picture's own edge has none
    torch.testing.assert_close(middle, torch.cat([ramp, torch.ones(8), ramp.flip(0)]))
    assert torch.equal(first[:12], torch.ones(12)) and torch.equal(last[4:], torch.ones(12))


def sized_model(size=32):
    """Of SMALL's toy, whose latents are 4 times smaller; and a list of the shapes that its two networks are given."""
    model, shapes = random_model(replace(SMALL["toy"], size=size)), []
    for network in (model.encoder, model.decoder):
        network.register_forward_pre_hook(lambda network, args: shapes.append(tuple(args[0].shape)))
    return model, shapes


def test_below_its_memory_nothing_changes():
    model, shapes = sized_model()
    x, z = torch.randn(2, 3, 48, 40), torch.randn(2, 12, 12, 10)
    encode, decode = model.bytes_per_pixel()
    mean, logvar, decoded = *model.encode(x), model.decode(z)
    model.memory = 2 * 48 * 40 * encode
    assert all(torch.equal(a, b) for a, b in zip(model.encode_any_size(x), (mean, logvar)))
    model.memory = 2 * 48 * 40 * decode
    assert torch.equal(model.decode_any_size(z), decoded)
    shapes.clear()
    model.memory -= 1  # one picture still fits
    assert relative_error(model.decode_any_size(z), decoded) <= 1e-5  # BLAS may sum in another order for a batch
    assert shapes == [(1, 12, 12, 10)] * 2


def test_above_its_memory_no_more_is_computed_at_once():
    model, shapes = sized_model()
    x, z = torch.randn(2, 3, 96, 160), torch.randn(2, 12, 24, 40)
    encode, decode = model.bytes_per_pixel()
    model.memory = 50 * 50 * encode
    mean, logvar = model.encode_any_size(x)
    assert mean.shape == logvar.shape == (2, 12, 24, 40) and len(shapes) > 2 and len(set(shapes)) == 1
    assert 32 * 32 <= shapes[0][2] * shapes[0][3] <= 50 * 50
    shapes.clear()
    model.memory = 50 * 50 * decode
    assert model.decode_any_size(z).shape == (2, 3, 96, 160) and len(shapes) > 2 and len(set(shapes)) == 1
    assert 8 * 8 <= shapes[0][2] * shapes[0][3] <= 12.5 * 12.5


def test_tiles_have_a_smallest_size_whatever_the_memory():
    model, shapes = sized_model()
    model.memory = 0
    mean, _ = model.encode_any_size(torch.randn(1, 3, 36, 100))
    decoded = model.decode_any_size(mean)
    assert decoded.shape == (1, 3, 36, 100) and decoded.isfinite().all()
    assert set(shapes) == {(1, 3, 32, 32), (1, 12, 8, 8)}
    small = torch.randn(1, 3, 24, 16)  # a single tile
    torch.testing.assert_close(model.encode_any_size(small), model.encode(small))


def test_a_wrong_size_is_refused_in_tiles_too():
    model, _ = sized_model()
    model.memory = 0
    for shape in [(1, 3, 64, 90), (1, 3, 90, 64), (1, 1, 64, 64)]:
        with pytest.raises(ValueError, match="multiples of 4"):
            model.encode_any_size(torch.zeros(shape))


def test_the_size_of_tiles_is_in_the_configuration():
    toy = vae.CONFIGS["toy"]
    told = configs.vae_config_to_json(toy)
    assert configs.vae_config_from_json(told).size == toy.size == 128
    assert configs.vae_config_from_json({name: told[name] for name in told if name != "sample_size"}).size == 512


def exaggeration(model, x, z):
    """The estimates of `encode` and `decode` over what is alive at one time in truth."""
    truth = peak_memory(lambda: model.encode(x)), peak_memory(lambda: model.decode(z))
    return [x[0, 0].numel() * estimate / true for estimate, true in zip(model.bytes_per_pixel(), truth)]


QUARTER = VAEConfig((32, 64, 128, 128))  # of Stable Diffusion's widths


@pytest.mark.parametrize("config", [vae.CONFIGS["toy"], QUARTER], ids=["toy", "quarter"])
@pytest.mark.parametrize(("quick", "size"), [(False, 192), (True, 320)])
def test_the_estimate_of_memory(config, quick, size):
    """Of quick convolutions it leaves out some MB, the same for all sizes: hence the larger picture."""
    model = quicken(random_model(config), keep=False) if quick else random_model(config)
    x, z = torch.randn(1, 3, size, size), torch.randn(1, config.latent_channels, size // 8, size // 8)
    encode, decode = exaggeration(model, x, z)
    assert 0.7 <= encode <= 1.5 and 0.7 <= decode <= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_memory_at_full_size(dtype):
    """On the meta device, whose tensors have sizes and no content."""
    with torch.device("meta"):
        model = VAE(vae.CONFIGS["sd"]).to(dtype).requires_grad_(False)
        x, z = torch.empty(1, 3, 512, 512, dtype=dtype), torch.empty(1, 4, 64, 64, dtype=dtype)
    encode, decode = exaggeration(model, x, z)
    assert 0.7 <= encode <= 1.5 and 0.7 <= decode <= 1.5


def test_tiles_of_the_toy_have_no_seams():
    """Pictures twice as wide and high as what it was trained on, in 3 x 3 tiles and in 2 x 2 larger ones, against the
    whole. Four tiles put side by side show what a seam is."""
    toy = sd.load(sample.TOY, torch.float32)
    assert toy.vae.config.size == 128
    x = toyworld.render(toyworld.random_scenes(2, torch.Generator().manual_seed(5)), 256).image * 2 - 1
    with torch.inference_mode():
        z = toy.encode_image(x)
        whole = toy.decode(z)
        side_by_side = torch.cat([torch.cat([toy.decode(part) for part in row.split(16, 3)], 3)
                                  for row in z.split(16, 2)], 2)
        assert jump(side_by_side - whole, {128}) >= 8  # 12.8 measured
        # In latent pixels, and measured: 30.2 and 36.1 dB, 0.18 and 0.074 of the latents, jumps of 0.71 and 0.80
        for side, least_psnr, most_off in (16, 29, 0.2), (24, 35, 0.1):
            toy.vae.memory = (8 * side) ** 2 * toy.vae.bytes_per_pixel()[1]
            faded, off = toy.decode(z), (toy.encode_image(x) - z).norm() / z.norm()
            edges = {8 * edge for tile, _, _ in cuts(32, side, side // 4, 1, 8) for edge in (tile.start, tile.stop)}
            assert psnr(faded, whole) >= least_psnr and off <= most_off
            assert jump(faded - whole, edges - {0, 256}) <= 1


def jump(error, edges):
    """How much the error changes from column to column at these edges, in terms of its mean change."""
    change = error.diff(dim=3).abs().mean((0, 1, 2))
    return (change[[edge - 1 for edge in edges]].mean() / change.mean()).item()


def psnr(a, b):
    """In dB, of pictures in [-1, 1]."""
    return (20 * (2 / (a - b).square().mean().sqrt()).log10()).item()
