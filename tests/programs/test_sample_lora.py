"""sample.py --lora: it is merged at its weight, several add up, and the picture's own parameters name them."""

import pytest
from PIL import Image

import sd
from checkpoints.lora import merge_lora
from tests import loras, small
from tests.runs import GRADIENT, MEADOW, run, same_picture

MODELS = {"sd1": small.stable_diffusion, "xl": small.stable_diffusion_xl}


@pytest.mark.parametrize("kind", MODELS)
def test_a_picture_with_loras(tmp_path, capsys, kind):
    files = []
    for seed in (1, 2):
        model = MODELS[kind]()
        lora = loras.make(model, seed)
        files.append(loras.save(tmp_path / f"{seed}.safetensors", loras.kohya(lora, model)))
    model = MODELS[kind]()
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


def test_with_a_refiner_the_base_changes(tmp_path):
    for kind in ("base", "refiner"):
        sd.save(small.stable_diffusion_xl(kind), tmp_path / kind)
    model = small.stable_diffusion_xl()
    file = loras.save(tmp_path / "it.safetensors", loras.kohya(loras.make(model), model))
    this = ["--weights", tmp_path / "base", "--refiner", tmp_path / "refiner", "--prompt", "cats", "--switch"]
    assert not same_picture(run(tmp_path, *this, 1, "--lora", file), run(tmp_path, *this, 1))
    assert same_picture(run(tmp_path, *this, 0, "--lora", file), run(tmp_path, *this, 0))
