"""RAFT against torchvision and against the authors' layout, with the same random weights.

RAFT_REPO=/path/to/princeton-vl/RAFT also runs the authors' own code, from a checkout of it.
"""

import os
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from checkpoints import published
from networks import raft
from video.estimators import dis_flow

SIZES = [(136, 152), (131, 141)]  # multiples of 8, and what is filled up to them


def randomise(model, seed=0):
    """Weights for flows that stay in frame and updates that settle, as trained ones do: wilder ones would multiply
    rounding errors at every iteration. Statistics and scales of normalisations so that leaving one out would show.
    """
    g = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=g)
        elif name.endswith("running_mean") or tensor.ndim == 1 and tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=g)
        elif tensor.ndim == 4:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=g)
        if "flow_head.conv2" in name:
            tensor *= 0.3
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data += 1
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torchvision")
    from torchvision.models.optical_flow import raft_large

    return randomise(raft_large(weights=None))


@pytest.fixture(scope="module")
def model():
    return randomise(raft.RAFT())


def pictures(N, H, W, seed=1):
    """A smooth texture that moves and grows, a little noise: (N, 3, H, W) in [-1, 1]"""
    g = torch.Generator().manual_seed(seed)
    texture = F.interpolate(torch.rand(1, 3, 24, 24, generator=g), (2 * H, 2 * W), mode="bicubic")[0].clamp(0, 1)
    frames = [F.interpolate(texture[None, :, 3 * i : H + 7 * i, 5 * i : W + 9 * i], (H, W), mode="bilinear")[0]
              for i in range(N)]
    return (torch.stack(frames) + 0.05 * torch.rand(N, 3, H, W, generator=g)).clamp(0, 1) * 2 - 1


def padded(x):
    """The authors' InputPadder, for Sintel -> padded, and what takes the padding off"""
    H, W = x.shape[-2:]
    y, x_ = -H % 8, -W % 8
    return F.pad(x, (x_ // 2, x_ - x_ // 2, y // 2, y - y // 2), mode="replicate"), (
        ..., slice(y // 2, y // 2 + H), slice(x_ // 2, x_ // 2 + W))


def error(a, b):
    assert a.shape == b.shape and b.abs().max() > 1  # pixels: flows that say something
    return ((a - b).abs().max() / b.abs().max()).item()


# --- Parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W", SIZES[1:])
def test_every_iteration_is_torchvisions(peer, tmp_path, H, W):
    torch.save(peer.state_dict(), tmp_path / "raft_large.pth")
    model, (first, second) = published.load("raft", tmp_path / "raft_large.pth"), pictures(4, H, W).chunk(2)
    (first_, crop), (second_, _) = padded(first), padded(second)
    theirs = torch.stack(peer(first_, second_))[crop]
    ours = model(first, second, every=True)
    assert theirs.shape == (12, 2, 2, H, W)
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert torch.equal(model(first, second), ours[-1]) and torch.equal(model(first, second, 3), ours[2])


def original_layout(tensors, prefix="module."):
    """torchvision's {name: tensor} -> the authors', spelled out from their core/*.py, not from the table in raft.py"""
    names = {}
    for here, there in (("feature_encoder", "fnet"), ("context_encoder", "cnet")):
        names |= {f"{here}.convnormrelu.0": [f"{there}.conv1"], f"{here}.convnormrelu.1": [f"{there}.norm1"],
                  f"{here}.conv": [f"{there}.conv2"]}
        for block in (f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)):
            names |= {f"{here}.{block}.convnormrelu{n}.0": [f"{there}.{block}.conv{n}"] for n in (1, 2)}
            names |= {f"{here}.{block}.convnormrelu{n}.1": [f"{there}.{block}.norm{n}"] for n in (1, 2)}
            names |= {f"{here}.{block}.downsample.0": [f"{there}.{block}.downsample.0"],
                      f"{here}.{block}.downsample.1": [f"{there}.{block}.norm3", f"{there}.{block}.downsample.1"]}
    here, there = "update_block.motion_encoder", "update_block.encoder"
    names |= {f"{here}.convcorr1.0": [f"{there}.convc1"], f"{here}.convcorr2.0": [f"{there}.convc2"],
              f"{here}.convflow1.0": [f"{there}.convf1"], f"{here}.convflow2.0": [f"{there}.convf2"],
              f"{here}.conv.0": [f"{there}.conv"], "mask_predictor.convrelu.0": ["update_block.mask.0"],
              "mask_predictor.conv": ["update_block.mask.2"]}
    names |= {f"update_block.recurrent_block.convgru{n}.conv{gate}": [f"update_block.gru.conv{gate}{n}"]
              for gate in "zrq" for n in (1, 2)}
    names |= {f"update_block.flow_head.conv{n}": [f"update_block.flow_head.conv{n}"] for n in (1, 2)}
    return {f"{prefix}{other}.{leaf}": tensor for name, tensor in tensors.items()
            for stem, leaf in [name.rsplit(".", 1)] for other in names[stem]}


@pytest.mark.parametrize("prefix, extension", [("module.", "old pth"), ("", "pth"), ("", "safetensors")])
def test_original_layout(model, tmp_path, prefix, extension):
    tensors = original_layout(model.state_dict(), prefix)
    assert len(tensors) == len(model.state_dict()) + 2 * 5  # two norm3 in cnet are stored twice
    path = tmp_path / f"raft-things.{extension.split()[-1]}"
    if extension == "safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:  # raft-things.pth itself is older than today's format
        torch.save(tensors, path, _use_new_zipfile_serialization=extension == "pth")
    loaded = published.load("raft", path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    first, second = pictures(2, 128, 136).split(1)
    assert error(loaded(first, second, 2), model(first, second, 2)) <= 1e-5  # of weights at other addresses
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.skipif("RAFT_REPO" not in os.environ, reason="no RAFT_REPO")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("H, W", SIZES)
def test_the_authors_code(tmp_path, monkeypatch, H, W):
    monkeypatch.syspath_prepend(os.path.join(os.environ["RAFT_REPO"], "core"))
    monkeypatch.setitem(sys.modules, "scipy", types.SimpleNamespace(interpolate=None))  # imported, not used here
    from raft import RAFT as Theirs
    from utils.utils import InputPadder

    class Arguments(types.SimpleNamespace):
        def __contains__(self, name):
            return hasattr(self, name)

    theirs = randomise(nn.DataParallel(Theirs(Arguments(small=False, mixed_precision=False))))
    torch.save(theirs.state_dict(), tmp_path / "raft-things.pth", _use_new_zipfile_serialization=False)
    model = published.load("raft", tmp_path / "raft-things.pth")
    first, second = ((pictures(2, H, W) + 1) * 127.5).round().split(1)
    padder = InputPadder(first.shape)
    flows = theirs(*padder.pad(first, second))
    ours = model(2 * (first / 255) - 1, 2 * (second / 255) - 1, every=True)
    assert max(error(a, padder.unpad(b)) for a, b in zip(ours, flows)) < 1e-4


def test_flows_of_a_clip_are_the_releases(peer, model):
    """Magic Fixup, data_processing/processing_utils.py, compute_flow; its torchvision calls, at a smaller size."""
    from torchvision.transforms.functional import resize

    frames = ((pictures(2, 150, 190) + 1) * 127.5).round().byte()
    size = (136, 200)
    first, second = (resize(x[None], size, antialias=False) / 255 * 2 - 1 for x in frames)
    flow = peer(first, second, num_flow_updates=4)[-1]
    theirs = resize(flow, (150, 190), antialias=False) * torch.tensor([190 / 200, 150 / 136]).view(2, 1, 1)
    first, second = frames.permute(0, 2, 3, 1).numpy()
    (ours,) = raft.clip_flows(model, [first, second], size, 4)
    assert error(ours, theirs[0]) < 1e-4
    same_as = dis_flow(first, second)
    assert (ours.shape, ours.dtype, ours.is_contiguous()) == (same_as.shape, same_as.dtype, True)
    reversed_twice = np.flip(np.flip(first, 1).copy(), 1)  # a view with negative steps
    assert torch.equal(raft.clip_flows(model, [reversed_twice, second], size, 4)[0], ours)


# --- The look-up, clips, memory -------------------------------------------------------------------


def test_look_up_is_its_definition():
    g = torch.Generator().manual_seed(0)
    g1, g2 = torch.randn(2, 2, 6, 17, 19, generator=g)
    x = 40 * torch.rand(2, 2, 17, 19, generator=g) - 10  # many leave the frame
    x[0, :, 0, :4] = torch.tensor([[1e30, -1e30, 3.0, 18.0], [2.0, 5.0, -1e12, 16.0]])
    found = raft.make_look_up(g1, g2)(x).view(2, 4, 9, 9, 17, 19)
    volume = torch.einsum("bchw,bcij->bhwij", g1, g2).double() / 6**0.5
    for b, i, j in [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 16, 18), (1, 0, 0), (0, 5, 11), (1, 9, 3)]:
        for level in range(4):
            c = F.avg_pool2d(volume[b, i, j][None], 2**level)[0]
            for dx, dy in [(-4, -4), (4, -4), (0, 0), (1, 0), (0, 3), (4, 4)]:
                X, Y = (x[b, :, i, j] / 2**level).double() + torch.tensor([dx, dy])
                Xs, Ys = torch.arange(c.shape[1]), torch.arange(c.shape[0])
                wanted = (1 - (Y - Ys).abs()).clamp(min=0) @ c @ (1 - (X - Xs).abs()).clamp(min=0)
                assert abs(found[b, level, dx + 4, dy + 4, i, j] - wanted) < 1e-5


@pytest.mark.parametrize("memory", [2**24, 2**31])  # 2, all pairs at once
def test_a_clip_is_its_pairs(model, memory):
    frames = pictures(4, 131, 141)
    flows = model.flows(frames, 2, memory)
    pairs = [model(first, second, 2) for first, second in zip(frames[:-1].split(1), frames[1:].split(1))]
    assert flows.shape == (3, 2, 131, 141) and error(flows, torch.cat(pairs)) < 1e-5
    assert model.flows(frames[:1]).shape == (0, 2, 131, 141)


@pytest.mark.parametrize("H, W", [(1, 1), (40, 300), (127, 129)])
def test_any_size(model, H, W):
    frames = torch.rand(2, 1, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flow = model(*frames, iterations=2)
    assert flow.shape == (1, 2, H, W) and flow.isfinite().all()


def test_half_precision_on_request(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "raft.pth")
    half = published.load("raft", tmp_path / "raft.pth", torch.bfloat16)
    first, second = pictures(2, 128, 128).split(1)
    assert half.mask_predictor.conv.weight.dtype == torch.bfloat16
    ours, theirs = half(first, second, 2), model(first, second, 2)
    assert ours.dtype == torch.float32 and error(ours, theirs) < 0.1


def test_wrong_pictures(model):
    x = torch.zeros(1, 3, 128, 128)
    with pytest.raises(ValueError, match="one size"):
        model(x, x[..., :120])
    for wrong in (x[0], x[:, :1], x[:0]):
        with pytest.raises(ValueError, match=r"are \(B, 3, H, W\)"):
            model.flows(wrong)
