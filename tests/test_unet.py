"""unet.py against diffusers' UNet2DConditionModel, on random weights at small widths."""

from dataclasses import replace

import pytest
import torch

import unet
from checkpoints import configs
from unet import UNet, UNetConfig

SMALL = {
    "sd1": UNetConfig(channels=(32, 64), depth=(1, 0), heads=8, context=24),
    "sd1-inpainting": UNetConfig(in_channels=9, channels=(32, 64, 64), depth=(1, 1, 0), heads=4, context=24),
    "sd2": UNetConfig(channels=(32, 64), depth=(1, 0), heads=None, head_width=16, linear_proj=True, context=40),
    "xl": UNetConfig(channels=(32, 32, 64), depth=(0, 1, 2), mid_depth=2, heads=None, head_width=16, linear_proj=True,
                     context=40, added=6 * 8 + 20),
    "toy": UNetConfig(12, 12, (32, 64), layers=1, depth=(1, 1), heads=4, context=16, groups=8),
}


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = UNet(config).eval().requires_grad_(False)
    for p in model.parameters():  # every bias and norm gets a value of its own
        p += 0.05 * torch.randn(p.shape)
    return model


def inputs(config, h=8, w=8, batch=2, length=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, config.in_channels, h, w, generator=g)
    context = torch.randn(batch, length, config.context, generator=g)
    return z, torch.randint(0, 1000, (batch,), generator=g), context


def peer_of(model):
    """diffusers' model with the same weights. Its options are written out here, independently of sd.py."""
    diffusers = pytest.importorskip("diffusers")
    c = model.config
    cross = [d > 0 for d in c.depth]
    options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
               "projection_class_embeddings_input_dim": c.added} if c.added else {}
    if len({d for d in c.depth if d} | {c.mid_depth}) > 1:
        options["transformer_layers_per_block"] = [max(1, d) for d in c.depth]
    peer = diffusers.UNet2DConditionModel(
        in_channels=c.in_channels, out_channels=c.out_channels, block_out_channels=c.channels,
        layers_per_block=c.layers, cross_attention_dim=c.context, norm_num_groups=c.groups,
        down_block_types=["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in cross],
        up_block_types=["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(cross)],
        attention_head_dim=c.heads or [w // c.head_width for w in c.channels],
        use_linear_projection=c.linear_proj, **options,
    )
    return peer


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("name", SMALL)
def test_same_numbers_as_diffusers(name, size):
    config = SMALL[name]
    model = random_model(config)
    peer = peer_of(model)
    peer.load_state_dict(model.state_dict())
    z, t, context = inputs(config, *size)
    if config.added:
        pooled, sizes = torch.randn(2, 20), torch.randint(0, 1024, (2, 6))
        embedded = unet.timestep_embedding(sizes.flatten(), 8).reshape(2, -1)
        added, extra = torch.cat([pooled, embedded], dim=1), {"text_embeds": pooled, "time_ids": sizes}
        got, want = model(z, t, context, added), peer.eval()(z, t, context, added_cond_kwargs=extra).sample
    else:
        got, want = model(z, t, context), peer.eval()(z, t, context).sample
    assert got.shape == (2, config.out_channels, *size)
    assert relative_error(got, want) <= 1e-4


@pytest.mark.parametrize("name", ["sd1", "sd2", "toy"])
def test_keys_and_values_made_ahead_are_the_same_bits(name):
    model = random_model(SMALL[name])
    z, t, context = inputs(SMALL[name])
    ahead = model.keys_values(context)
    assert len(ahead) == len(model.transformer_blocks())
    assert torch.equal(model(z, t, ahead), model(z, t, context))
    assert torch.equal(model(z, t, ahead), model(z, t, context))  # they can be used again


@pytest.mark.parametrize("name", ["sd1", "toy"])
def test_times_made_ahead_are_the_same_numbers(name):
    model = random_model(SMALL[name])
    z, t, context = inputs(SMALL[name])
    want, ahead = model(z, t, context), model.times(t)
    assert torch.equal(model(z, ahead, context), want)
    steps = model.times_of([900, 501, 1])
    for step in (501, 7):  # one of the steps, and one that was not told
        t = torch.full((len(z),), step)
        assert torch.is_tensor(steps(t)) == (step == 7)
        assert relative_error(model(z, steps(t), context), model(z, t, context)) <= 1e-5
    assert model.times_of([])(t) is t


def test_taps_are_the_inputs_to_self_attention():
    model = random_model(SMALL["sd1-inpainting"])
    z, t, context = inputs(SMALL["sd1-inpainting"])
    seen, taps = [], []
    for block in model.transformer_blocks():
        block.attn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(z, t, context, taps=taps)
    assert torch.equal(out, model(z, t, context))
    want = [(2, 64, 32)] * 2 + [(2, 16, 64)] * 2 + [(2, 4, 64)] + [(2, 16, 64)] * 3 + [(2, 64, 32)] * 3
    assert [tuple(tap.shape) for tap in taps] == want
    assert all(torch.equal(a, b) for a, b in zip(taps, seen))


@pytest.mark.parametrize(("name", "count"), [("sd1", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684)])
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(unet.CONFIGS[name]).parameters()) == count


@pytest.mark.parametrize("name", unet.CONFIGS)
def test_shapes_give_the_configuration_back(name):
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in UNet(unet.CONFIGS[name]).state_dict().items()}
    want = unet.CONFIGS[name]
    if name == "toy":
        want = replace(want, heads=8)  # heads have no shape
    assert configs.unet_config_from_shapes(shapes) == want


def test_half_precision_stays_half():
    model = random_model(SMALL["sd1"]).bfloat16()
    z, t, context = inputs(SMALL["sd1"])
    assert model(z.bfloat16(), t, context.bfloat16()).dtype == torch.bfloat16
