"""unet.py against diffusers' UNet2DConditionModel, on the same random weights at small widths."""

import pytest
import torch

import unet
from checkpoints.parts import load_part
from tests.small import TOY, randomise, relative_error
from unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "sd1": UNetConfig(channels=(32, 64), depth=(1, 0), heads=8, context=24),
    "sd1-inpainting": UNetConfig(9, channels=(32, 64, 64), depth=(1, 1, 0), heads=4, context=24),
    "sd2": UNetConfig(channels=(32, 64), depth=(1, 0), heads=None, head_width=16, linear_proj=True, context=40),
    "xl": UNetConfig(channels=(32, 32, 64), depth=(0, 1, 2), mid_depth=2, heads=None, head_width=16, linear_proj=True,
                     context=40, added=6 * 8 + 20),
    "toy": TOY,
}


def make_peer(c, **options):
    """diffusers' model for that configuration. Its options are written out here, independently of configs.py."""
    cross = [d > 0 for d in c.depth]
    if c.added:
        options["addition_embed_type"] = "text_time"
        options["addition_time_embed_dim"] = 8
        options["projection_class_embeddings_input_dim"] = c.added
    if len({d for d in c.depth if d} | {c.mid_depth}) > 1:
        options["transformer_layers_per_block"] = [max(1, d) for d in c.depth]
    return diffusers.UNet2DConditionModel(
        in_channels=c.in_channels, out_channels=c.out_channels, block_out_channels=c.channels,
        layers_per_block=c.layers, cross_attention_dim=c.context, norm_num_groups=c.groups,
        down_block_types=["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in cross],
        up_block_types=["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(cross)],
        attention_head_dim=c.heads or [w // c.head_width for w in c.channels],
        use_linear_projection=c.linear_proj, **options).eval()


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_same_numbers_as_diffusers(name, size):
    config = SMALL[name]
    torch.manual_seed(0)
    model, peer = randomise(UNet(config)), make_peer(config)
    peer.load_state_dict(model.state_dict())
    z = torch.randn(2, config.in_channels, *size)
    t = torch.randint(0, 1000, (2,))
    context = torch.randn(2, 7, config.context)

    added, extra = None, None
    if config.added:  # XL: pooled text, and six sizes, each as an embedding of 8
        pooled, sizes = torch.randn(2, 20), torch.randint(0, 1024, (2, 6))
        embedded = unet.timestep_embedding(sizes.flatten(), 8).reshape(2, -1)
        added = torch.cat([pooled, embedded], dim=1)
        extra = {"text_embeds": pooled, "time_ids": sizes}
    got = model(z, t, context, added)
    assert got.shape == (2, config.out_channels, *size)
    assert relative_error(got, peer(z, t, context, added_cond_kwargs=extra).sample) <= 1e-4


@torch.no_grad()
def test_a_latent_consistency_model_is_told_its_guidance(tmp_path):
    config = SMALL["sd1"]
    peer = randomise(make_peer(config, time_cond_proj_dim=256))
    peer.save_pretrained(tmp_path)
    model = load_part(tmp_path, "unet")
    assert model.guided  # so that sample.py does not guide it once more
    w = torch.tensor([8.5 - 1] * 2)
    told = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, 256)
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([259, 999]), torch.randn(2, 7, config.context)
    want = peer(z, t, context, timestep_cond=told).sample
    assert relative_error(model(z, t, context), want) <= 1e-4
    assert relative_error(peer(z, t, context).sample, want) > 1e-3  # it matters
