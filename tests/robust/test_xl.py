"""A Stable Diffusion XL where it does not belong, or without what it needs: each is one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import sd
import train
from checkpoints.words import learn_word
from diffusion import Schedule
from models import xl
from tests import small
from tests.runs import MEADOW, fails, run


def test_a_model_in_another_ones_place(tmp_path, folders, capsys):
    words = ["--prompt", "cats", "--steps", 2, "--out", tmp_path / "out.png", "--weights"]
    base, refiner, old = (folders / name for name in ("base", "refiner", "sd1"))
    assert "is a refiner of Stable Diffusion XL: it goes with --refiner" in fails(capsys, *words, refiner)
    assert "is a refiner of Stable Diffusion XL" in fails(capsys, *words, refiner, "--refiner", refiner)
    assert f"{base} is no refiner" in fails(capsys, *words, base, "--refiner", base)
    assert f"{old} is no refiner" in fails(capsys, *words, base, "--refiner", old)
    assert "refines its own base alone" in fails(capsys, *words, old, "--refiner", refiner)
    assert "none.safetensors" in fails(capsys, *words, base, "--refiner", tmp_path / "none.safetensors")
    assert "--switch needs --refiner" in fails(capsys, *words, base, "--switch", 0.5)
    assert "--switch" in fails(capsys, *words, base, "--refiner", refiner, "--switch", 1.5)
    assert "--refiner does not go with --edit" in fails(capsys, "--image", MEADOW, "--edit", MEADOW, "--refiner", base)
    assert not (tmp_path / "out.png").exists()


def test_refiners_of_an_ordinary_model(tmp_path, folders, capsys):
    """Any plain model of its latents, or a UNet alone."""
    words = ["--prompt", "cats", "--steps", 2, "--out", tmp_path / "out.png", "--weights", folders / "sd1", "--refiner"]
    inpainting, wide, otherwise = tmp_path / "inpainting", tmp_path / "wide", tmp_path / "otherwise"
    sd.save(small.stable_diffusion("inpainting"), inpainting)
    assert "inpainting is an inpainting model: a refiner is a plain one" in fails(capsys, *words, inpainting)
    shutil.copytree(folders / "base/unet", wide / "unet")
    assert "its parts do not fit: the UNet reads text of width 192" in fails(capsys, *words, wide)
    sd.save(small.stable_diffusion("sd1", "v_prediction"), otherwise)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(otherwise / part)
    assert "trained with scaled_linear and v_prediction, the base with" in fails(capsys, *words, otherwise)
    shutil.rmtree(otherwise / "scheduler")
    run(tmp_path, *words[-3:], otherwise, "--prompt", "cats")


def test_magic_fixup_begins_as_another_model(tmp_path, folders, capsys):
    line = fails(capsys, "--init", folders / "base", "--out", tmp_path / "run", program=train)
    assert "not as an XL" in line


def test_a_refiner_that_was_trained_otherwise():
    base, refiner = small.stable_diffusion_xl(), small.stable_diffusion_xl("refiner")
    xl.check_refiner(base, refiner, "it")
    refiner.schedule = Schedule(prediction="v_prediction")
    with pytest.raises(ValueError, match="it was trained with scaled_linear and v_prediction, the base with"):
        xl.check_refiner(base, refiner, "it")


def test_a_learned_word_for_another_model(tmp_path):
    save_file({"<x>": torch.ones(64)}, tmp_path / "word.safetensors")
    with pytest.raises(ValueError, match="not with an XL"):
        learn_word(small.stable_diffusion_xl(), tmp_path / "word.safetensors")


def test_a_folder_whose_parts_are_not_there_or_do_not_fit(tmp_path):
    sd.save(small.stable_diffusion_xl(), tmp_path)

    def refused(words, error=ValueError):
        with pytest.raises(error, match=words) as info:
            sd.load(tmp_path)
        assert "\n" not in str(info.value) and str(tmp_path) in str(info.value)

    (tmp_path / "text_encoder").rename(tmp_path / "away")
    refused("no folder text_encoder/", FileNotFoundError)
    (tmp_path / "model_index.json").rename(tmp_path / "index")
    refused("UNet reads text of width 192 .* the text encoder gives 128")
    (tmp_path / "away").rename(tmp_path / "text_encoder")
    (tmp_path / "index").rename(tmp_path / "model_index.json")
    config = tmp_path / "unet/config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"addition_time_embed_dim": 8}))
    refused("told a vector of 1584, not 6 sizes of 8 and pooled text of 48")
    for bad in ("256", -1, [256], 10**12):
        config.write_text(json.dumps(said | {"addition_time_embed_dim": bad}))
        refused("size_width")
    config.write_text(json.dumps(said))
    index = tmp_path / "model_index.json"
    for bad in ("x", None, 3, [], {"text_encoder_2": 5}):
        index.write_text(json.dumps({"text_encoder": bad, "text_encoder_2": bad}))
        sd.load(tmp_path)
    sd.save(small.stable_diffusion("sd1"), tmp_path / "old")
    (tmp_path / "old/text_encoder").rename(tmp_path / "old/text_encoder_2")
    (tmp_path / "old/model_index.json").unlink()
    with pytest.raises(ValueError, match="5 sizes of 256"):
        sd.load(tmp_path / "old")


def test_a_text_encoder_of_one_layer(tmp_path):
    model = small.stable_diffusion_xl()
    model.xl.text = small.randomise(type(model.xl.text)(small.replace(model.xl.text.config, layers=1)))
    sd.save(model, tmp_path)
    with pytest.raises(ValueError, match="one layer"):
        sd.load(tmp_path)
