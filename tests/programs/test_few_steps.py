"""sample.py with models of few steps: recognised by their folder, or named by an option."""

import json

import pytest
from PIL import Image

import sample
import sd
from common.files import read_json, write_json
from diffusion import Schedule
from tests import small
from tests.runs import GRADIENT, MEADOW, last_line

LCM, TURBO = ("lcm", 4, 1.0), ("ddim", 4, 1.0)
FILE = "scheduler/scheduler_config.json"


def save(folder, **changes):
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
    save(tmp_path, **folder)
    out = tmp_path / "out.png"
    sample.main(["--weights", str(tmp_path), "--image", MEADOW, "--change-map", GRADIENT, "--prompt", "a circle",
                 "--precision", "fp32", "--out", str(out), *said])
    found = json.loads(Image.open(out).text["parameters"])
    assert (found["sampler"], found["steps"], found["guidance"]) == wanted


def test_a_negative_prompt_without_guidance(tmp_path, capsys):
    save(tmp_path, timestep_spacing="trailing")
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
