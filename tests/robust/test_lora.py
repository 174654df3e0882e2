"""Files that are no LoRA, damaged or for another model: each is one line, and nothing is merged."""

import pytest
import torch
from safetensors.torch import save_file

import sd
from checkpoints.lora import merge_lora
from tests import loras, small
from tests.runs import MEADOW, fails

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def refused(model, path, words, weight=1.0):
    before = loras.weights(model)
    with pytest.raises(ValueError, match=words) as e:
        merge_lora(model, path, weight)
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert all(torch.equal(W, before[key]) for key, W in loras.weights(model).items())


@pytest.mark.parametrize("layout", [loras.kohya, loras.original, loras.diffusers])
def test_a_lora_for_another_model(tmp_path, layout):
    models = {"sd1": small.stable_diffusion(), "xl": small.stable_diffusion_xl()}
    for ours, theirs in (("sd1", "xl"), ("xl", "sd1")):
        model = models[theirs]
        file = loras.save(tmp_path / f"{theirs}.safetensors", layout(loras.make(model), model))
        refused(models[ours], file, "does not fit this model")


def test_what_another_model_is(tmp_path):
    """By the width of the text that the UNet reads"""
    for width, family in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")):
        name = Q.replace("attn1_to_q", "attn2_to_k")
        tensors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(64, 2)}
        refused(small.stable_diffusion(), loras.save(tmp_path / "it.safetensors", tensors), f"; it is for {family}$")


def test_a_file_that_is_damaged_or_something_else(tmp_path):
    model = small.stable_diffusion()
    good = loras.kohya(loras.make(model), model)
    down, up, alpha = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", f"{Q}.alpha"
    numbers = good[down]
    nan = numbers.clone()
    nan[1, 3] = float("nan")
    for change, words in (
        ({down: nan}, "lora_down.weight' is not finite"),
        ({alpha: torch.tensor(float("inf"))}, "alpha' is not finite"),
        ({alpha: torch.ones(2)}, r"alpha of the shape \(2,\)"),
        ({down: numbers[:, :-1]}, "down of the shape"),
        ({down: numbers[:-1]}, "up of the shape"),
        ({down: numbers[:0], up: good[up][:, :0]}, "up of the shape"),
        ({down: torch.tensor(1.0)}, "of the shape"),
        ({down: numbers[..., None]}, "down of the shape"),
        ({down: numbers.long()}, "no tensor of floating-point"),
        ({f"{Q}.lora_mid.weight": torch.ones(3, 3, 3, 3)}, "mid of the shape"),
        ({f"{Q}.dora_scale": torch.ones(3, 1)}, "magnitudes of the shape"),
        ({f"{Q}.dora_scale": torch.tensor(1.0)}, "magnitudes of the shape"),
        ({"a\nb.lora_up.weight": numbers}, "1 entries that no LoRA"),
        ({f"{Q}.lora_B.bias": torch.ones(64)}, "1 entries that no LoRA"),
        ({f"{Q}.hada_w1_a": torch.ones(64, 2)}, "1 entries that no LoRA.*hada_w1_a"),
        ({f"{Q}_A.lora_up.weight": numbers}, "is not whole: .* has no down"),
        ({f"{Q}.lora_A.weight": numbers}, "has two tensors down"),
        ({"unet." + Q[10:] + ".lora.down.weight": numbers, "unet." + Q[10:] + ".lora.up.weight": good[up]},
         "a layer under two names"),
        ({"lora_te3_x.lora_down.weight": numbers, "lora_te3_x.lora_up.weight": numbers}, "1 of .* 'lora_te3_x'"),
        ({up: 3e38 * torch.ones_like(good[up]), down: 1e5 * torch.ones_like(numbers)}, "not finite: take less"),
    ):
        refused(model, loras.save(tmp_path / "it.safetensors", good | change), words)
    refused(model, loras.save(tmp_path / "it.safetensors", {"<x>": torch.ones(64)}), "is no LoRA: .* '<x>'")
    refused(model, loras.save(tmp_path / "model.safetensors", small.to_original(model)), "is no LoRA")
    other = {"a.lokr_w1": torch.ones(4), "a.alpha": torch.ones(1)}
    refused(model, loras.save(tmp_path / "it.safetensors", other), "no LoRA, LoCon or DoRA has, e.g. 'a.lokr_w1'")
    alphas = ["NaN", '"4"', "1" + "0" * 400, "[4]"]
    for said in ("[1]", "{", "[" * 100_000, *(f'{{"unet.lora_alpha": {alpha}}}' for alpha in alphas)):
        tensors = {name: x for name, x in good.items() if not name.endswith("alpha")}
        refused(model, loras.save(tmp_path / "it.safetensors", tensors, lora_adapter_metadata=said), "is damaged")


def test_a_pickle_that_claims_more_than_it_has(tmp_path):
    model = small.stable_diffusion()
    tensors = {f"{Q}.lora_down.weight": torch.ones(1, 1).expand(2**28, 64),
               f"{Q}.lora_up.weight": torch.ones(1, 1).expand(64, 2**28)}
    torch.save(tensors, tmp_path / "it.pt")
    refused(model, tmp_path / "it.pt", "is damaged")
    whole = {f"{Q}.lora_down.weight": torch.ones(1, 64), f"{Q}.lora_up.weight": torch.ones(64, 1)}
    torch.save(whole | {f"{Q}.alpha": 10**400}, tmp_path / "it.pt")
    refused(model, tmp_path / "it.pt", "is damaged")
    torch.save({f"{Q}.alpha": torch.nn.Linear(2, 2)}, tmp_path / "it.pt")  # which would run code
    refused(model, tmp_path / "it.pt", "is refused")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_a_weight_that_is_no_number(tmp_path, weight):
    refused(small.stable_diffusion(), tmp_path / "it.safetensors", "is a number", weight)


def test_on_the_command_line(tmp_path, capsys):
    model = small.stable_diffusion()
    sd.save(model, tmp_path / "sd1")
    xl = small.stable_diffusion_xl()
    good = loras.save(tmp_path / "good.safetensors", loras.kohya(loras.make(model), model))
    other = loras.save(tmp_path / "xl.safetensors", loras.kohya(loras.make(xl), xl))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    this = ["--weights", tmp_path / "sd1", "--prompt", "cats", "--steps", 2, "--out", tmp_path / "out.png"]
    assert "does not fit this model" in fails(capsys, *this, "--lora", other)
    assert "is no LoRA" in fails(capsys, *this, "--lora", tmp_path / "x.safetensors:0.5")
    assert "there is no file" in fails(capsys, *this, "--lora", tmp_path / "none.safetensors")
    for weight in ("much", "nan", "1e9", ""):
        assert f"--lora: {weight!r} is not a number" in fails(capsys, *this, "--lora", f"{good}:{weight}")
    assert "the name is empty" in fails(capsys, *this, "--lora", ":1")
    assert "the name is empty" in fails(capsys, *this, "--lora", "")
    line = fails(capsys, "--image", MEADOW, "--edit", MEADOW, "--lora", good)
    assert "--lora does not go with --edit" in line
    assert not (tmp_path / "out.png").exists()
