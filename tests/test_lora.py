"""checkpoints/lora.py: what is merged is the papers' formulas by hand, in every layout and in any model."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sd
from checkpoints.lora import merge_lora
from tests import loras, small
from tests.runs import GRADIENT, MEADOW, fails, run, same_picture

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
        for key, layer in loras.layers(model).items():
            layer.weight.copy_(old[key])
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
        got = merged(f"{name}.{'pt' if name == 'PEFT' else 'safetensors'}", tensors)
        assert all(torch.equal(got[key], want[key]) for key in want), name


def test_a_file_of_peft_alone(tmp_path):
    """Of one network, and alpha is in a file beside it."""
    model, twice = small.stable_diffusion(), small.stable_diffusion()
    lora = loras.make(model, rank=4, alpha=None, only="unet")
    both = loras.diffusers(lora, model)
    own = {name.replace("unet.", "base_model.model.", 1): x for name, x in both.items()}
    file = loras.save(tmp_path / "adapter_model.safetensors", own)
    with pytest.raises(FileNotFoundError, match="there is no file .*adapter_config.json"):
        merge_lora(model, file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    assert merge_lora(model, file) == merge_lora(twice, loras.save(tmp_path / "both.safetensors", both), 2) == len(lora)
    assert all(torch.equal(W, loras.weights(twice)[key]) for key, W in loras.weights(model).items())


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

    # What kohya's program extracts from a model has whole numbers.
    model = small.stable_diffusion()
    whole = {name: torch.tensor(8) if name.endswith(".alpha") else x for name, x in loras.kohya(lora, model).items()}
    merge_lora(model, loras.save(tmp_path / "it.safetensors", whole))
    assert same(loras.weights(model), twice)


@pytest.mark.parametrize("dora", [None, "out"])
def test_weight_0_changes_nothing(tmp_path, dora):
    model, same = small.stable_diffusion(), small.stable_diffusion()
    lora = loras.make(model, dora=dora, only="mid_block|layers.0")
    assert merge_lora(model, loras.save(tmp_path / "it.safetensors", loras.kohya(lora, model)), 0) == len(lora)
    before, after = small.weights(same), small.weights(model)
    assert all(torch.equal(x, before[name]) for name, x in after.items())


def test_two_add_up(tmp_path):
    """In any order; and one with its opposite is nothing."""
    files = []
    for seed in (1, 2):
        model = small.stable_diffusion()
        files.append(loras.save(tmp_path / f"{seed}.safetensors", loras.kohya(loras.make(model, seed), model)))
    changes = []
    for steps in ([(0, 1)], [(1, 0.5)], [(0, 1), (1, 0.5)], [(1, 0.5), (0, 1)], [(0, 1), (0, -1)]):
        model = small.stable_diffusion()
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


# --- Files that are no LoRA, damaged or for another model: each is one line, and nothing is merged ----


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


# --- sample.py --lora: merged at its weight, several add up, the picture's own parameters name them -----


def test_a_picture_with_loras(tmp_path, capsys):
    files = []
    for seed in (1, 2):
        model = small.stable_diffusion()
        lora = loras.make(model, seed)
        files.append(loras.save(tmp_path / f"{seed}.safetensors", loras.kohya(lora, model)))
    model = small.stable_diffusion()
    sd.save(model, tmp_path / "plain")
    merge_lora(model, files[0], 0.5)
    merge_lora(model, files[1])
    sd.save(model, tmp_path / "merged")

    edit = ["--image", MEADOW, "--change-map", GRADIENT, "--prompt", "a red circle"]
    plain = run(tmp_path, *edit, "--weights", tmp_path / "plain")
    capsys.readouterr()
    got = run(tmp_path, *edit, "--weights", tmp_path / "plain", "--lora", f"{files[0]}:0.5", "--lora", files[1])
    said = capsys.readouterr().out
    assert f"1.safetensors changes {len(lora)} layers, at weight 0.5" in said
    assert f"2.safetensors changes {len(lora)} layers, at weight 1" in said
    assert "1.safetensors" in str(Image.open(tmp_path / "out.png").text)
    assert same_picture(got, run(tmp_path, *edit, "--weights", tmp_path / "merged")) and not same_picture(got, plain)
    assert same_picture(run(tmp_path, *edit, "--weights", tmp_path / "plain", "--lora", f"{files[0]}:0"), plain)


def test_with_a_refiner_the_base_changes(tmp_path, folders):
    model = small.stable_diffusion_xl()
    file = loras.save(tmp_path / "it.safetensors", loras.kohya(loras.make(model), model))
    this = ["--weights", folders / "base", "--refiner", folders / "refiner", "--prompt", "cats", "--switch"]
    assert not same_picture(run(tmp_path, *this, 1, "--lora", file), run(tmp_path, *this, 1))
    assert same_picture(run(tmp_path, *this, 0, "--lora", file), run(tmp_path, *this, 0))
