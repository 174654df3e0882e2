"""sample.py with a Stable Diffusion XL: every edit of Differential Diffusion, with and without a refiner."""

import json

import pytest
from PIL import Image

from tests.runs import GRADIENT, MEADOW, run, same_picture

EDITS = {
    "map": ["--image", MEADOW, "--change-map", GRADIENT],
    "fan": ["--image", MEADOW, "--strength-fan", 4],
    "text": [],
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit(tmp_path, folders, edit):
    base, refiner = folders / "base", folders / "refiner"
    words = ["--weights", base, "--prompt", "a red circle", *EDITS[edit]]
    alone = run(tmp_path, *words)
    said = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert said["sampler"] == "euler" and "switch" not in said
    both = run(tmp_path, *words, "--refiner", refiner)
    said = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert said["refiner"] == str(refiner) and said["switch"] == 0.8
    assert not same_picture(alone, both)
    assert same_picture(run(tmp_path, *words, "--refiner", refiner, "--switch", 1), alone)
