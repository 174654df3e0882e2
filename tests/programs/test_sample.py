"""sample.py as a command: edits with a prompt, on the shipped toy weights."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
import sd
from common.files import read_json, write_json
from common.pictures import picture_to_tensor, tensor_to_picture
from diffusion import Schedule
from editing import inputs, options
from kernels import winograd
from reproduce.train_toys import widened
from tests import small
from tests.runs import GRADIENT, MEADOW, ROOT, fails, last_line, run, same_picture


@pytest.fixture(scope="module")
def toy():
    model = sd.load(sample.TOY, torch.float32)
    winograd.quicken(model.vae)  # as sample.py does on a CPU
    return model


@pytest.fixture(scope="module")
def round_trip(toy):
    with torch.inference_mode():
        z_init = toy.encode_image(picture_to_tensor(Image.open(MEADOW), (128, 128)))
        return np.asarray(tensor_to_picture(toy.decode(z_init)[0] / 2 + 0.5), int)


@pytest.mark.parametrize("option", ["--mask", "--change-map"])
def test_a_pictures_own_alpha(tmp_path, option):
    """What is transparent changes, as in a mask of the same."""
    mask = np.tile(np.where(np.arange(128) < 64, 0, 255).astype(np.uint8), (128, 1))
    Image.fromarray(mask).save(tmp_path / "mask.png")
    picture = Image.open(MEADOW).convert("RGB")
    picture.putalpha(Image.fromarray(mask))
    picture.save(tmp_path / "holes.png")
    argv = ["--image", tmp_path / "holes.png", "--prompt", "snow at night", "--size", 64, option]
    a = run(tmp_path, *argv, "alpha")
    assert same_picture(a, run(tmp_path, *argv, tmp_path / "mask.png"))
    assert not same_picture(a, run(tmp_path, *argv, "alpha", "--white-is-change"))


def test_a_name_that_the_output_cannot_show(tmp_path, monkeypatch):
    """As Windows has it for > log.txt: what is saved is no failure."""
    log = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", log)
    run(tmp_path, "--prompt", "snow", "--size", "64", out="雪.png", steps=10)
    log.flush()
    assert (tmp_path / "雪.png").exists() and b"\\u96ea.png: 64x64" in log.buffer.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_log_is_no_failure(tmp_path):
    argv = [sys.executable, ROOT / "sample.py", "--prompt", "snow", "--steps", "10", "--out", tmp_path / "out.png"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(argv, stdout=full, stderr=full).returncode == 0
    assert (tmp_path / "out.png").exists()


def test_strength_is_a_grey_map(tmp_path):
    Image.new("L", (128, 128), 51).save(tmp_path / "grey.png")  # 51 / 255 = 0.2
    edit = ["--image", MEADOW, "--prompt", "sand at sunset", "--size", 64]
    a = run(tmp_path, *edit, "--strength", "0.8")
    b = run(tmp_path, *edit, "--change-map", tmp_path / "grey.png")
    assert same_picture(a, b)


def test_soft_inpainting_and_fan_and_text(tmp_path, round_trip):
    mask = np.full((128, 128), 255, np.uint8)
    mask[:, :40] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = run(tmp_path, "--image", MEADOW, "--mask", tmp_path / "mask.png", "--softness", 8, "--prompt", "night")
    change = np.abs(image - round_trip).mean((0, 2))
    assert change[:16].mean() > 5 * change[-16:].mean()
    fan = run(tmp_path, "--image", MEADOW, "--strength-fan", "0,0.5,1", "--prompt", "snow at night")
    assert fan.shape[1] == 128 and fan.shape[0] > 128  # a bar with labels above
    assert np.abs(fan[-128:, :40] - round_trip[:, :40]).mean() < np.abs(fan[-128:, -40:] - round_trip[:, -40:]).mean()
    assert run(tmp_path, "--prompt", "a red ball on snow at night").shape == (128, 128, 3)


def test_sheet_strip_and_parameters(tmp_path):
    run(tmp_path, "--image", MEADOW, "--change-map", GRADIENT, "--prompt", "snow\nat night", "--seed", "7",
        "--sheet", tmp_path / "sheet.png", "--steps-strip", tmp_path / "strip.png")
    parameters = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert parameters["seed"] == 7 and parameters["prompt"] == "snow\nat night" and parameters["steps"] == 4
    assert Image.open(tmp_path / "sheet.png").width > 3 * 256
    assert Image.open(tmp_path / "strip.png").width > 4 * 128
    assert not list(tmp_path.glob(".*"))


def test_same_seed_same_picture_and_skipping_is_exact(tmp_path):
    """On one machine and by one number of threads, bit for bit: half-precision weights are made fp32 as they are read,
    and so always lie where PyTorch aligns them."""
    argv = ["--image", MEADOW, "--strength", "0.5", "--prompt", "snow at night", "--size", 64]
    a = run(tmp_path, *argv)
    assert np.array_equal(a, run(tmp_path, *argv)) and np.array_equal(a, run(tmp_path, *argv, "--no-skip"))
    assert not same_picture(a, run(tmp_path, *argv, "--seed", "1"))


def test_an_inpainting_model_sees_mask_and_picture(tmp_path, toy):
    """A toy inpainting model made of the toy: the added input columns are zero, so it must give the toy's own edit."""
    wide = widened(toy.unet, toy.unet.config.in_channels + 1)
    sd.save(dataclasses.replace(toy, unet=wide), tmp_path / "inpainting")
    mask = np.full((128, 128), 255, np.uint8)
    mask[:, :40] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["--image", MEADOW, "--mask", tmp_path / "mask.png", "--softness", 4, "--prompt", "night", "--size", 64]
    image = run(tmp_path, *argv, "--weights", tmp_path / "inpainting")
    assert np.abs(image - run(tmp_path, *argv)).max() <= 1
    with torch.no_grad():
        wide.conv_in.weight[:, toy.unet.config.in_channels :] = 1
    sd.save(dataclasses.replace(toy, unet=wide), tmp_path / "inpainting")
    assert np.abs(run(tmp_path, *argv, "--weights", tmp_path / "inpainting") - image).mean() > 1


def test_half_precision_and_size_and_negative(tmp_path):
    argv = ["--image", MEADOW, "--strength", "0.5", "--prompt", "snow at night", "--steps", "4", "--size", "64"]
    full = run(tmp_path, *argv)
    sample.main([*argv, "--precision", "bf16", "--device", "cpu", "--out", str(tmp_path / "half.png")])
    half = np.asarray(Image.open(tmp_path / "half.png"), int)
    assert 0 < np.abs(half - full).mean() < 6
    assert run(tmp_path, *argv, "--size", "96x64").shape == (64, 96, 3)
    assert np.abs(run(tmp_path, *argv, "--negative", "snow") - full).mean() > 1


def test_steps_too_few_for_full_noise_are_warned_of(tmp_path, capsys):
    for steps, warned in ((7, True), (10, False)):
        run(tmp_path, "--prompt", "snow", "--steps", steps, "--size", "32")
        said = capsys.readouterr().err
        assert ("warning: 7 steps start at t = 853, far below full noise" in said) == ("warning" in said) == warned


def test_a_fan_of_a_number_of_columns():
    assert options.read_strengths("5") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert options.read_strengths("0.2,1") == [0.2, 1]


def test_a_fan_of_more_columns_than_there_are_latents(tmp_path, capsys):
    fan = "--image", MEADOW, "--strength-fan", 17, "--size", "64", "--out", tmp_path / "out.png"
    assert "has 17 columns, and this size room for 16" in last_line(capsys, *fan)


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(tmp_path, capsys):
    run(tmp_path, "--prompt", "snow " * 100, "--steps", 10, "--size", "32")
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and "75" in lines[0]


@pytest.mark.slow
def test_a_small_memory_for_the_autoencoder_makes_tiles(tmp_path):
    argv = "--image", MEADOW, "--change-map", GRADIENT, "--prompt", "snow at night", "--size", "256"
    whole, tiled = run(tmp_path, *argv), run(tmp_path, *argv, "--vae-memory", "0.01")
    assert 0 < np.square(whole - tiled).mean() < 10**-2.5 * 255**2  # more than 25 dB


def test_learned_words(tmp_path, capsys):
    """A word that learned what "night" means."""
    toy = sd.load(sample.TOY, torch.float32)
    row = toy.text.text_model.embeddings.token_embedding.weight[toy.tokenizer.encode("night")]
    save_file({"<my-night>": row.clone()}, tmp_path / "word.safetensors")
    this = ["--prompt", "snow at <my-night>", "--words", tmp_path / "word.safetensors"]
    learned = run(tmp_path, *this)
    assert "is the word <my-night>" in "".join(capsys.readouterr())
    assert same_picture(learned, run(tmp_path, "--prompt", "snow at night"))
    assert "--words" in fails(capsys, "--words", tmp_path / "word.safetensors", "--image", MEADOW, "--strength", "0.5")


def test_words_for_a_picture(tmp_path, capsys):
    """--prompt auto: by the toy's captioner for the toy's weights, by BLIP for others, whose file is looked for."""
    auto = ["--image", MEADOW, "--strength", "0.5", "--prompt", "auto"]
    run(tmp_path, *auto, steps=2)
    prompt = json.loads(Image.open(tmp_path / "out.png").text["parameters"])["prompt"]
    assert " at " in prompt and f"the prompt is '{prompt}'" in capsys.readouterr().out
    line = fails(capsys, *auto, "--weights", tmp_path / "sd.safetensors")
    assert "BLIP needs blip-image-captioning-base/model.safetensors" in line
    assert "say which" in fails(capsys, "--prompt", "auto")


@pytest.mark.parametrize("name, width, toy", [("model", 128, True), ("toyota", 768, False), ("toy", None, False)])
def test_a_toy_is_known_by_its_width(tmp_path, name, width, toy):
    write_json(tmp_path / name / "text_encoder/config.json", {"hidden_size": width})
    assert inputs.is_toy(tmp_path / name) == toy and not inputs.is_toy(tmp_path / "toy.safetensors")


# --- Models of few steps: recognised by their folder, or named by an option --------------------------

LCM, TURBO = ("lcm", 4, 1.0), ("ddim", 4, 1.0)
FILE = "scheduler/scheduler_config.json"


def save_stable(folder, **changes):
    sd.save(small.stable_diffusion(), folder)
    write_json(folder / FILE, read_json(folder / FILE) | changes)
    return folder


@pytest.mark.parametrize("folder, said, wanted", [
    ({"_class_name": "LCMScheduler"}, [], LCM),
    ({"timestep_spacing": "trailing", "_class_name": "EulerDiscreteScheduler"}, [], TURBO),
    ({}, ["--sampler", "lcm"], LCM),
    ({}, ["--spacing", "trailing"], TURBO),
    ({"timestep_spacing": "trailing"}, ["--guidance", "2", "--steps", "5"], ("ddim", 5, 2.0)),
    ({}, ["--steps", "10"], ("ddim", 10, 7.5)),
])
def test_what_is_left_out(tmp_path, folder, said, wanted):
    save_stable(tmp_path, **folder)
    out = tmp_path / "out.png"
    sample.main(["--weights", str(tmp_path), "--image", MEADOW, "--change-map", GRADIENT, "--prompt", "a circle",
                 "--precision", "fp32", "--out", str(out), *said])
    found = json.loads(Image.open(out).text["parameters"])
    assert (found["sampler"], found["steps"], found["guidance"]) == wanted


def test_a_trailing_model_of_zero_terminal_snr_is_not_distilled(tmp_path, capsys):
    save_stable(tmp_path, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    edit = "--weights", tmp_path, "--prompt", "a circle", "--out", tmp_path / "out.png"
    assert "100 steps start at t = 999, where" in (said := last_line(capsys, *edit)) and "--spacing leading" in said


def test_a_negative_prompt_without_guidance(tmp_path, capsys):
    save_stable(tmp_path, timestep_spacing="trailing")
    edit = "--weights", tmp_path, "--prompt", "a circle", "--negative", "a square", "--out", tmp_path / "out.png"
    assert "no effect with --guidance 1" in last_line(capsys, *edit)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "lcm"])
def test_a_spacing_is_saved_and_loaded(tmp_path, spacing):
    model = small.stable_diffusion()
    model.schedule = Schedule(spacing=spacing)
    sd.save(model, tmp_path)
    c = read_json(tmp_path / FILE)
    assert (c["_class_name"] == "LCMScheduler") == (spacing == "lcm")
    write_json(tmp_path / FILE, c | {"steps_offset": 0})  # as old folders say, and diffusers' pipelines do not heed
    assert sd.load(tmp_path).schedule.space_timesteps(7) == model.schedule.space_timesteps(7)
