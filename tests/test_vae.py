"""vae.py against diffusers' AutoencoderKL, on random weights at small widths."""


import pytest
import torch

import vae
from vae import VAE, VAEConfig

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
    got, want = vae.config_from_shapes(shapes), vae.CONFIGS[name]
    assert got == VAEConfig(want.channels, want.layers, want.latent_channels, want.groups)
