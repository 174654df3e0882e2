"""unet.py: what one reads of it holds. That its numbers are diffusers' is in tests/parity."""

from dataclasses import replace

import pytest
import torch

import unet
from checkpoints import configs
from tests.small import TOY, UNETS, randomise, relative_error
from unet import UNet, UNetConfig

SMALL = {"sd1": UNETS["sd1"], "sd2": UNETS["sd2"], "toy": TOY}


def random_model(config):
    torch.manual_seed(0)
    return randomise(UNet(config))


def inputs(config, batch=2):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(batch, config.in_channels, 8, 8, generator=g)
    context = torch.randn(batch, 7, config.context or 0, generator=g)
    return z, torch.randint(0, 1000, (batch,), generator=g), context


# --- The forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_keys_and_values_made_ahead_are_the_same_bits(name):
    model = random_model(SMALL[name])
    z, t, context = inputs(SMALL[name])
    ahead = model.keys_values(context)
    assert len(ahead) == len(model.transformer_blocks())
    assert torch.equal(model(z, t, ahead), model(z, t, context))
    assert torch.equal(model(z, t, ahead), model(z, t, context))  # they can be used again


def test_every_block_reads_its_own_keys_and_values():
    """In the order of the forward pass, whatever the others' are: the injection of Magic Fixup."""
    config = UNetConfig(channels=(32, 64), depth=(2, 0), mid_depth=2, context=24)
    model = random_model(config)
    z, t, context = inputs(config)
    ahead, read = model.keys_values(context), []
    for block in model.transformer_blocks():
        block.attn2.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    model(z, t, ahead)
    assert len(read) == len(ahead) == 2 * 2 + 2 + 3 * 2
    assert all(mine is pair for mine, pair in zip(read, ahead))
    contexts = [context + i for i in range(len(ahead))]  # a list has a context for every block
    for block, pair, own in zip(model.transformer_blocks(), model.keys_values(contexts), contexts):
        assert all(map(torch.equal, pair, block.attn2.keys_values(own)))


@pytest.mark.parametrize("name", ["sd1", "toy"])
def test_times_made_ahead_are_the_same_numbers(name):
    model = random_model(SMALL[name])
    z, t, context = inputs(SMALL[name])
    want, ahead = model(z, t, context), model.embed_time(t)
    assert torch.equal(model(z, ahead, context), want)
    steps = model.times_of([900, 501, 1])
    for step in (501, 7):  # one of the steps, and another
        t = torch.full((len(z),), step)
        assert torch.is_tensor(steps(t)) == (step == 7)
        assert relative_error(model(z, steps(t), context), model(z, t, context)) <= 1e-5
    assert model.times_of([])(t) is t


def test_every_residual_block_adds_its_own_time():
    model = random_model(SMALL["sd2"])
    z, t, context = inputs(SMALL["sd2"])
    times, read = model.embed_time(t), []
    for resnet in model.resnets():
        resnet.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    model(z, times, context)
    assert len(read) == len(times) and all(mine is time for mine, time in zip(read, times))


@pytest.mark.parametrize("context", [24, 0])
def test_features_are_the_inputs_to_self_attention(context):
    config = UNetConfig(9, channels=(32, 64, 64), depth=(1, 1, 0), heads=4, context=context)
    model = random_model(config)
    z, t, words = inputs(config)
    words = words if context else ()
    seen, features = [], []
    for block in model.transformer_blocks():
        block.attn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(z, t, words, features=features)
    shapes = [(2, 64, 32)] * 2 + [(2, 16, 64)] * 2 + [(2, 4, 64)] + [(2, 16, 64)] * 3 + [(2, 64, 32)] * 3
    assert [tuple(f.shape) for f in features] == shapes
    assert all(map(torch.equal, features, seen))
    assert torch.equal(out, model(z, t, words))
    if not context:
        assert all(map(torch.equal, model.features(z, t), features))


def test_half_precision_stays_half():
    model = random_model(SMALL["sd1"]).bfloat16()
    z, t, context = inputs(SMALL["sd1"])
    assert model(z.bfloat16(), t, context.bfloat16()).dtype == torch.bfloat16


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("sd1", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684),
                                             ("sdxl-refiner", 2_259_526_660)])
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(unet.CONFIGS[name]).parameters()) == count


@pytest.mark.parametrize("name", unet.CONFIGS)
def test_shapes_give_the_configuration_back(name):
    want = unet.CONFIGS[name]
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in UNet(want).state_dict().items()}
    if name == "toy":
        want = replace(want, heads=8)  # heads have no shape
    assert configs.unet_config_from_shapes(shapes) == want
