"""winograd.py against its plain twin, F.conv2d: the algorithm, and whole networks before and after `quicken`."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import unet
import vae
from kernels import winograd
from kernels.winograd import QuickConv2d, convolve, pointwise, product, quicken, toom_cook, transform
from tests.small import relative_error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- The algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
def test_one_side_is_a_filter_in_exact_numbers(m):
    At, G, Bt = toom_cook(m)
    g, d = np.array([3.0, -1.0, 2.0]), np.arange(m + 2) ** 2.0
    assert np.allclose(At @ ((G @ g) * (Bt @ d)), [g @ d[i : i + 3] for i in range(m)], rtol=1e-13)


SHAPES = [  # batch, channels in and out, height, width
    (1, 1, 1, 1, 1), (3, 8, 24, 9, 10), (1, 40, 12, 5, 64), (2, 320, 32, 13, 6),
]


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("tiles", [1, 6, 256])  # at a time: one row of tiles, a few, several pictures
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_numbers_as_the_plain_convolution(m, tiles, shape, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    batch, c_in, c_out, h, w = shape
    x, weight, bias = torch.randn(batch, c_in, h, w), torch.randn(c_out, c_in, 3, 3), torch.randn(c_out)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = convolve(x.contiguous(memory_format=layout), transform(weight, m), bias, m)
        assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got, want) <= 1e-5
    without = convolve(x, transform(weight, m), None, m)
    assert relative_error(without + bias[:, None, None], want) <= 1e-5


@pytest.mark.parametrize(("size", "stride", "padding"), [
    ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0)), ((2, 5), (2, 1), (0, 2)), ((1, 1), (1, 1), (0, 0)),
])
def test_one_matrix_product_is_the_plain_convolution(size, stride, padding):
    x, weight, bias = torch.randn(2, 20, 9, 8), torch.randn(16, 20, *size), torch.randn(16)
    want = F.conv2d(x, weight, bias, stride, padding)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        assert relative_error(product(x, weight, bias, stride, padding), want) <= 1e-5
        if size == (1, 1):
            assert relative_error(pointwise(x, weight, bias), want) <= 1e-5
    assert relative_error(product(x, weight, None, stride, padding) + bias[:, None, None], want) <= 1e-5


# --- In a network ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def with_mkl(monkeypatch):
    """The networks are tested with any PyTorch, though only one with MKL is made quicker."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)


def layer(c_in, c_out, **more):
    return nn.Conv2d(c_in, c_out, **{"kernel_size": 3, "padding": 1} | more).requires_grad_(False)


def quick_layer(c_in, c_out, **more):
    return quicken(layer(c_in, c_out, **more))


def plain(conv, x):
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def ways(network, run):
    """{name of a convolution: the way it went}"""
    found = {}
    for name, conv in network.named_modules():
        if isinstance(conv, QuickConv2d):
            conv.register_forward_hook(
                lambda conv, x, _, name=name: found.update({name: conv.choose_way(*x[0].shape[2:])})
            )
    run()
    return found


@pytest.mark.parametrize(("c_in", "c_out", "side", "more", "way"), [
    (320, 320, 64, {}, 4), (640, 640, 32, {}, 2), (1280, 1280, 16, {}, 2), (1280, 1280, 8, {}, "product"),
    (4, 320, 64, {}, "channels last"), (64, 64, 16, {}, "channels first"), (640, 640, 32, {"stride": 2}, "product"),
    (2560, 1280, 8, {"kernel_size": 1, "padding": 0}, "pointwise"), (960, 320, 64, {"kernel_size": 1, "padding": 0},
                                                                     "as it comes"),
])  # fmt: skip
def test_the_way_of_a_layer(c_in, c_out, side, more, way):
    with torch.device("meta"):
        assert quick_layer(c_in, c_out, **more).choose_way(side, side) == way


# Random weights: every norm sees values of about the same size, as in a trained network.
WIDE = unet.UNetConfig(channels=(96, 256), layers=1, depth=(0, 0), heads=4, context=16)


@pytest.mark.parametrize(("size", "keep"), [((32, 32), True), ((33, 35), False)])
def test_a_quick_unet_gives_the_same_numbers(size, keep):
    network = unet.UNet(WIDE).eval().requires_grad_(False)
    z, t, context = torch.randn(2, 4, *size), torch.tensor([1, 500]), torch.randn(2, 5, 16)
    want, keys = network(z, t, context), list(network.state_dict())
    found = ways(quicken(network, keep), lambda: network(z, t, context))
    assert set(found.values()) >= {2, 4}
    assert relative_error(network(z, t, context), want) <= 1e-5
    assert list(network.state_dict()) == keys
    kept = {name for name, m in network.named_modules() if getattr(m, "kept", None) is not None}
    assert kept == ({name for name, way in found.items() if way in (2, 4)} if keep else set())


def test_a_quick_autoencoder_gives_the_same_numbers():
    model = vae.VAE(vae.VAEConfig((32, 96), 1)).eval().requires_grad_(False)
    x = torch.rand(1, 3, 64, 72) * 2 - 1
    mean, _ = model.encode(x)
    decoded = model.decode(mean)
    quicken(model, keep=False)
    assert relative_error(model.encode(x)[0], mean) <= 1e-5
    assert relative_error(model.decode(mean), decoded) <= 1e-5


def test_changed_weights_are_noticed():
    conv, x = quick_layer(96, 96), torch.randn(1, 96, 32, 32)

    def check():
        assert relative_error(conv(x), plain(conv, x)) <= 1e-5

    check()
    U = conv.kept[2]
    check()
    assert conv.kept[2] is U  # made once
    with torch.inference_mode():
        conv.weight.mul_(3)
    check()
    conv.load_state_dict(layer(96, 96).state_dict(), assign=True)
    check()
    conv.weight = nn.Parameter(torch.randn(96, 96, 3, 3), requires_grad=False)
    check()
    conv.double().float()
    check()
    with torch.inference_mode():  # what does not say when it changes is not kept
        conv = quick_layer(96, 96)
        conv(x)
        conv.weight.mul_(3)
        check()
        assert conv.kept is None


def test_copies_do_not_share_what_is_kept():
    conv, x = quick_layer(96, 96), torch.randn(1, 96, 32, 32)
    want = conv(x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert other.kept is None and conv.kept is not None
        assert torch.equal(other.weight, conv.weight)
        assert relative_error(other(x), want) <= 1e-5  # of weights at other addresses
        other.weight.zero_()
        assert torch.equal(other(x), other.bias[:, None, None].expand_as(want)) and torch.equal(conv(x), want)


def test_gradients_are_the_plain_ones():
    conv, x = layer(96, 96), torch.randn(1, 96, 32, 32)
    other = quicken(copy.deepcopy(conv))
    other(x)  # something is kept now
    for learning in (True, False):  # the weights; the input wants a gradient in both cases
        results = []
        for c in (conv, other):
            c.requires_grad_(learning)
            c.zero_grad()
            y = x.clone().requires_grad_()
            c(y).square().sum().backward()
            results.append([y.grad, *(p.grad for p in c.parameters() if learning)])
        assert len(results[0]) == len(results[1]) == (3 if learning else 1)
        assert all(relative_error(b, a) <= 1e-5 for a, b in zip(*results))  # of weights at other addresses


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "grouped", "dilated", "reflect", "same"])
def test_what_is_not_for_it_stays_plain(case, monkeypatch):
    more = {"grouped": {"groups": 2}, "dilated": {"dilation": 2}, "reflect": {"padding_mode": "reflect"},
            "same": {"padding": "same"}}.get(case, {})
    conv, x = layer(96, 96, **more), torch.randn(1, 96, 32, 32)
    if case == "bfloat16":
        monkeypatch.setattr(winograd, "SLOW", ())  # as with AMX tiles
        conv, x = conv.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        want = conv(x)
        got = quicken(conv)(x)
    assert got.dtype == want.dtype and torch.equal(got, want) and getattr(conv, "kept", None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("way", "size", "shape"), [
    (4, 3, (2, 96, 32, 32)), ("product", 3, (1, 1280, 8, 8)), ("pointwise", 1, (2, 96, 8, 8)),
    ("channels first", 3, (2, 16, 8, 8)),
])
def test_slow_halves_are_computed_in_single_and_rounded(dtype, way, size, shape, monkeypatch):
    monkeypatch.setattr(winograd, "SLOW", (dtype,))
    conv, x = layer(shape[1], shape[1], kernel_size=size, padding=size // 2).to(dtype), torch.randn(shape).to(dtype)
    want = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=size // 2)
    got = quicken(conv)(x)
    assert conv.choose_way(*shape[2:]) == way
    rounding = torch.finfo(dtype).eps / 2 * want.abs()
    assert got.dtype == dtype and ((got.float() - want).abs() <= 1.02 * rounding + 1e-4).all()


def test_without_mkl_nothing_is_done(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert type(quick_layer(96, 96)) is nn.Conv2d
