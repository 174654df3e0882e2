"""sample.py with a DeepFloyd IF: both of its stages under a map."""

import json

import numpy as np
import pytest
from PIL import Image

from common.pictures import picture_to_tensor, tensor_to_picture
from editing import options
from tests import small_deepfloyd as small_if
from tests.runs import GRADIENT, MEADOW, fails, half_white, run


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    first, second = small_if.write_cascade(tmp_path_factory.mktemp("if"))
    return ["--weights", first, "--super-resolution", second, "--prompt", "a red circle", "--image", MEADOW]


def test_what_is_white_stays(tmp_path, cascade):
    mask = half_white(tmp_path / "map.png")
    edited = run(tmp_path, *cascade, "--change-map", mask, "--negative", "cats", steps=3)
    small = tensor_to_picture(picture_to_tensor(Image.open(MEADOW), (16, 16))[0] / 2 + 0.5)
    kept = np.asarray(small, int)
    assert edited.shape == (16, 16, 3)
    assert np.array_equal(edited[:, 8:], kept[:, 8:]) and np.abs(edited[:, :8] - kept[:, :8]).mean() > 10
    said = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert (said["sampler"], said["steps"], said["seed"]) == ("ddpm", "3 and 3", 0)


def test_samples_and_a_fan(tmp_path, cascade):
    assert run(tmp_path, *cascade, "--strength-fan", 2, "--samples", 2, "--guidance", 1, steps=2) is None
    pictures = [np.asarray(Image.open(tmp_path / f"out-{seed}.png"), int) for seed in (0, 1)]
    assert pictures[0].shape[0] > 16 and not np.array_equal(*pictures)  # under a bar with labels


def test_what_does_not_go_with_it(tmp_path, capsys, cascade):
    for option in options.NOT_IF:
        assert option in vars(options.parse([], "")[1])
    words = [*cascade, "--change-map", GRADIENT, "--out", tmp_path / "out.png"]
    assert "--sampler does not go with --super-resolution" in fails(capsys, *words, "--sampler", "ddim")
    assert "needs --image, and DeepFloyd IF's first stage as --weights" in fails(capsys, *words[2:])
    assert "IF-I is DeepFloyd IF's: it goes with --super-resolution" in fails(capsys, *words[:2], *words[4:])
    assert "IF-II is not a stage I of DeepFloyd IF" in fails(capsys, *words, "--weights", cascade[3])
    assert not any(tmp_path.iterdir())
