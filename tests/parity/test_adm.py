"""models/adm.py against diffusers' UNet2DConditionModel: Kandinsky's, and those of both stages of DeepFloyd IF."""

import json

import pytest
import torch

from models import adm
from tests.small import randn, randomise, relative_error

diffusers = pytest.importorskip("diffusers")

COMMON = dict(
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), block_out_channels=(32, 64),
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=32, layers_per_block=1)
IF = COMMON | dict(in_channels=3, out_channels=6, act_fn="gelu", addition_embed_type="text", cross_attention_dim=64,
                   addition_embed_type_num_heads=2, cross_attention_norm="group_norm", attention_head_dim=8)
# As DeepFloyd's own weights are converted: their small test in diffusers applies the activation twice.
SECOND = IF | dict(in_channels=6, layers_per_block=[1, 2], class_embed_type="timestep", resnet_skip_time_act=True,
                   mid_block_scale_factor=1 / 0.7071, resnet_out_scale_factor=1 / 0.7071, time_embedding_dim=48,
                   time_embedding_act_fn="gelu")
SMALL = {
    "kandinsky": COMMON | dict(in_channels=4, out_channels=8, addition_embed_type="image", cross_attention_dim=32,
                               encoder_hid_dim_type="image_proj", attention_head_dim=4),
    "if-1": IF,
    "if-2": SECOND | dict(only_cross_attention=True),
    "if-2-looks-at-itself": SECOND,
}


def pair(name):
    """The peer, and ours from its config.json and its weights"""
    torch.manual_seed(0)
    peer = randomise(diffusers.UNet2DConditionModel(**SMALL[name]))
    model = adm.ADM(adm.config_from_json(json.loads(peer.to_json_string()))).eval().requires_grad_(False)
    model.load_state_dict(peer.state_dict())
    return peer, model


def ask_peer(peer, z, t, states, level):
    """diffusers' own call, for a text's states (B, L, D) or an image embedding (B, D)"""
    if states.ndim == 2:
        return peer(z, t, None, added_cond_kwargs={"image_embeds": states}).sample
    return peer(z, t, states, class_labels=level).sample


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_same_numbers_as_diffusers(name):
    peer, model = pair(name)
    z, t = randn(2, model.config.in_channels, 8, 12), torch.tensor([3, 700])
    states = randn(2, 7, 32) if model.config.text else randn(2, 32)
    level = torch.tensor([250, 30]) if model.config.noised else None
    got = model(z, t, *model.condition(states, level))
    assert got.shape == (2, model.config.out_channels, 8, 12)
    assert relative_error(got, ask_peer(peer, z, t, states, level)) <= 1e-4


@pytest.mark.parametrize("name", ["kandinsky", "if-2"])
@torch.no_grad()
def test_guidance_is_for_the_noise_and_the_variance_is_the_prompts(name):
    peer, model = pair(name)
    C = model.config.out_channels // 2
    beside = randn(1, C, 5, 7, seed=1) if model.config.noised else None  # odd sides, which diffusers does not take
    states = randn(4, 7, 32) if model.config.text else randn(4, 32)
    level = 250 if model.config.noised else None
    z, t = randn(2, C, 5, 7), torch.tensor([41, 41])
    seen = z if beside is None else torch.cat([z, beside.expand(2, -1, -1, -1)], dim=1)
    levels = None if level is None else torch.full((4,), level)
    out = model(torch.cat([seen, seen]), torch.cat([t, t]), *model.condition(states, levels))
    without, given = out.chunk(2)
    for timesteps in ((), [801, 41]):
        got = adm.make_denoiser(model, states, 3.0, timesteps, beside, level)(z, t)
        assert relative_error(got[:, :C], without[:, :C] + 3 * (given - without)[:, :C]) <= 1e-5
        assert relative_error(got[:, C:], given[:, C:]) <= 1e-5
        got = adm.make_denoiser(model, states[2:], 1, timesteps, beside, level)(z, t)
        assert relative_error(got, given) <= 1e-5


WRONG = [("kandinsky", "act_fn", "mish"), ("kandinsky", "resnet_time_scale_shift", "default"),
         ("kandinsky", "mid_block_scale_factor", 2.0), ("kandinsky", "down_block_types", ["DownBlock2D"] * 2),
         ("kandinsky", "attention_head_dim", 24), ("if-1", "cross_attention_norm", None),
         ("if-2", "time_embedding_act_fn", None), ("if-2", "class_embed_type", "projection"),
         ("if-2", "mid_block_only_cross_attention", False)]


@pytest.mark.parametrize("name, option, value", WRONG)
def test_other_configurations_are_refused(name, option, value):
    with torch.device("meta"):
        c = json.loads(diffusers.UNet2DConditionModel(**SMALL[name]).to_json_string())
    adm.config_from_json(c)
    with pytest.raises(ValueError, match="^(its config.json has|its|heads of)"):
        adm.config_from_json(c | {option: value})


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert sum(p.numel() for p in adm.ADM(adm.ADMConfig()).parameters()) == 1_253_057_288
        for c, count in ((192, 371_605_830), (320, 935_365_830), (704, 4_304_695_110)):
            config = adm.ADMConfig(3, 6, (c, 2 * c, 3 * c, 4 * c), states=4096, context=4 * c, text=True,
                                   activation="gelu", time_width=4 * c)
            assert sum(p.numel() for p in adm.ADM(config).parameters()) == count
