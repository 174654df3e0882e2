"""checkpoints/lora.py: what is merged is the papers' formulas by hand, in every layout and in any model."""

import json

import pytest
import torch

import sd
from checkpoints.lora import merge_lora
from tests import loras, small

MODELS = {"sd1": small.stable_diffusion, "sd2": lambda: small.stable_diffusion("sd2"),
          "xl": small.stable_diffusion_xl, "refiner": lambda: small.stable_diffusion_xl("refiner")}


def by_hand(W, factors, weight):
    """The change of every number of W, each in a loop of its own over the ranks"""
    scale = weight * factors["alpha"].item() / len(factors["down"])
    out = W.double().clone()
    up, down = factors["up"].double(), factors["down"].double()
    for a in range(len(down)):
        column = up[:, a].flatten()
        if "mid" in factors:
            row = torch.zeros(*W.shape[1:], dtype=torch.double)
            for b in range(len(down)):
                row += down[b].flatten()[:, None, None] * factors["mid"][a, b].double()
        else:
            row = down[a].reshape(W.shape[1:])
        out += scale * column.reshape(-1, *[1] * (W.ndim - 1)) * row
    return out


def close(a, b):
    return (a.double() - b.double()).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("mid", [False, True])
def test_weights_by_hand(tmp_path, mid):
    """Linear layers, 1x1 and 3x3 convolutions; every other number stays as it is, bit for bit."""
    model = small.stable_diffusion()
    lora = loras.make(model, mid=mid, only="mid_block|down_blocks.0|layers.0")
    shapes = {tuple(layers.weight.shape[2:]) for key, layers in loras.layers(model).items() if key in lora}
    assert shapes == {(), (1, 1), (3, 3)} and mid == any("mid" in factors for factors in lora.values())
    before = {name: x.clone() for name, x in small.weights(model).items()}
    old = loras.weights(model)
    file = loras.save(tmp_path / "it.safetensors", loras.kohya(lora, model))
    assert merge_lora(model, file, 0.7) == len(lora)
    for key, W in loras.weights(model).items():
        if key in lora:
            assert close(W, by_hand(old[key], lora[key], 0.7)) and not torch.equal(W, old[key])
        else:
            assert torch.equal(W, old[key])
    changed = [name for name, x in small.weights(model).items() if not torch.equal(x, before[name])]
    assert len(changed) == len(lora) and all(name.endswith(".weight") for name in changed)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("weight", [1, 0.4])
def test_dora_by_hand(tmp_path, side, weight):
    model = small.stable_diffusion()
    lora = loras.make(model, dora=side, only="mid_block|layers.0")
    old = loras.weights(model)
    merge_lora(model, loras.save(tmp_path / "it.safetensors", loras.kohya(lora, model)), weight)
    for key, factors in lora.items():
        V = by_hand(old[key], factors, 1)
        if side == "in":
            V = V.transpose(0, 1)
        rows = [m * v / (v * v).sum().sqrt() for m, v in zip(factors["dora_scale"].flatten().double(), V)]
        whole = torch.stack(rows)
        if side == "in":
            whole = whole.transpose(0, 1)
        want = old[key] + weight * (whole - old[key].double())
        assert close(loras.layers(model)[key].weight, want)


@pytest.mark.parametrize("kind", MODELS)
def test_every_layout_is_the_same(tmp_path, kind):
    """Of every layer that there is."""
    def merged(name, tensors):
        model = MODELS[kind]()
        assert merge_lora(model, loras.save(tmp_path / name, tensors), 0.5) == len(lora)
        return loras.weights(model)

    model = MODELS[kind]()
    old = loras.weights(model)
    lora = loras.make(model)
    want = merged("kohya.safetensors", loras.kohya(lora, model))
    assert want.keys() == lora.keys() and not any(torch.equal(want[key], old[key]) for key in lora)
    layouts = {"original": loras.original(lora, model), "PEFT": loras.diffusers(lora, model)}
    layouts |= {how: loras.diffusers(lora, model, how) for how in ("dots", "processor", "bare")}
    assert len({frozenset(tensors) for tensors in layouts.values()}) == len(layouts)
    assert any("input_blocks" in name for name in layouts["original"])
    for name, tensors in layouts.items():
        for suffix in (".safetensors", ".pt"):
            got = merged(name + suffix, tensors)
            assert all(torch.equal(got[key], want[key]) for key in want), name


def test_a_dora_in_both_layouts(tmp_path):
    got = []
    for write in (loras.kohya, loras.diffusers):
        model = small.stable_diffusion()
        lora = loras.make(model, dora="out")
        merge_lora(model, loras.save(tmp_path / "it.safetensors", write(lora, model)))
        got.append(loras.weights(model))
    assert all(torch.equal(got[0][key], got[1][key]) for key in got[0])


def test_alpha(tmp_path):
    """The tensor's, or the configuration's, or the rank."""
    def merged(alpha, said=None):
        model = small.stable_diffusion()
        lora = loras.make(model, rank=4, alpha=alpha, only="to_q|q_proj")
        metadata = {"lora_adapter_metadata": json.dumps(said)} if said else {}
        merge_lora(model, loras.save(tmp_path / "it.safetensors", loras.diffusers(lora, model), **metadata))
        return loras.weights(model)

    def same(a, b, only=""):
        return all(torch.equal(a[key], b[key]) for key in a if only in key[1])

    rank, twice = merged(4.0), merged(8.0)
    assert not same(rank, twice) and same(merged(None), rank)
    assert same(merged(None, {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 8}), twice)
    assert same(merged(None, {"unet.lora_alpha": 4, "unet.use_rslora": True, "text_encoder.lora_alpha": 8.0}), twice)
    got = merged(None, {"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 8}})
    assert same(got, twice, "attn1.to_q") and same(got, rank, "attn2.to_q")
    assert same(merged(4.0, {"unet.lora_alpha": 99}), rank)

    # A pickle may have numbers in place of tensors.
    model = small.stable_diffusion()
    lora = loras.make(model, rank=4, only="to_q|q_proj")
    numbers = {name: 8 if name.endswith(".alpha") else x for name, x in loras.kohya(lora, model).items()}
    merge_lora(model, loras.save(tmp_path / "it.pt", numbers))
    assert same(loras.weights(model), twice)


@pytest.mark.parametrize("dora", [None, "out"])
def test_weight_0_changes_nothing(tmp_path, dora):
    model, same = small.stable_diffusion(), small.stable_diffusion()
    lora = loras.make(model, dora=dora)
    assert merge_lora(model, loras.save(tmp_path / "it.safetensors", loras.kohya(lora, model)), 0) == len(lora)
    for name, x in small.weights(model).items():
        assert torch.equal(x, small.weights(same)[name])


def test_two_add_up(tmp_path):
    """In any order; and one with its opposite is nothing."""
    files = []
    for seed in (1, 2):
        model = small.stable_diffusion_xl()
        files.append(loras.save(tmp_path / f"{seed}.safetensors", loras.kohya(loras.make(model, seed), model)))
    changes = []
    for steps in ([(0, 1)], [(1, 0.5)], [(0, 1), (1, 0.5)], [(1, 0.5), (0, 1)], [(0, 1), (0, -1)]):
        model = small.stable_diffusion_xl()
        old = loras.weights(model)
        for i, weight in steps:
            merge_lora(model, files[i], weight)
        changes.append({key: W - old[key] for key, W in loras.weights(model).items()})
    first, second, both, reverse, nothing = changes
    for key in both:
        assert (both[key] - first[key] - second[key]).abs().max() <= 1e-6 and both[key].abs().max() > 1e-3
        assert (both[key] - reverse[key]).abs().max() <= 1e-6 and nothing[key].abs().max() <= 1e-6


def test_half_precision_and_a_saved_folder(tmp_path):
    """Merged in fp32, and stored as the model is: of bf16 the nearest numbers. A saved folder has it merged."""
    model = small.stable_diffusion()
    lora = loras.make(model)
    file = loras.save(tmp_path / "it.safetensors", loras.kohya(lora, model))
    sd.save(model, tmp_path / "half", torch.bfloat16)
    half = sd.load(tmp_path / "half", torch.bfloat16)
    old = loras.weights(half)
    merge_lora(half, file)
    for key, W in loras.weights(half).items():
        assert W.dtype == torch.bfloat16
        assert (W.double() - by_hand(old[key], lora[key], 1)).abs().max() <= 2**-8 * W.abs().max()
    sd.save(half, tmp_path / "merged")
    again = loras.weights(sd.load(tmp_path / "merged", torch.bfloat16))
    assert all(torch.equal(again[key], W) for key, W in loras.weights(half).items())
