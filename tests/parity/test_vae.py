"""vae.py against diffusers' AutoencoderKL, on the same random weights at small widths."""

import pytest
import torch

from tests.small import randomise, relative_error
from vae import VAE, VAEConfig

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("c", [VAEConfig((32, 64, 64, 96)), VAEConfig((8, 16, 24), 1, 12, 8)], ids=["sd", "toy"])
@torch.no_grad()
def test_same_numbers_as_diffusers(c):
    torch.manual_seed(0)
    model = randomise(VAE(c))
    levels = len(c.channels)
    peer = diffusers.AutoencoderKL(
        latent_channels=c.latent_channels, block_out_channels=c.channels, layers_per_block=c.layers,
        norm_num_groups=c.groups, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels).eval()
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
