"""sample.py with computed change maps: what is wrong is said in a line, before weights are read."""

import pytest
import torch

import sample
from checkpoints import published
from editing.change_maps import RIGHT, gamma, parse_spec, quantize, window
from tests.runs import MEADOW, fails
from tests.small_networks import CLICK, write_clicks, write_networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def clicks(tmp_path):
    return write_clicks(tmp_path)


def test_transforms_refuse():
    mu = torch.zeros(2, 2)
    for transform, arguments in ((gamma, (0,)), (window, (0.5, 0.5)), (quantize, (1,))):
        with pytest.raises(ValueError):
            transform(mu, *arguments)


@pytest.mark.parametrize("text, said", {
    "depth:": "'' is no transform",
    "depth:flip": "'flip' is no transform",
    "depth:gamma": "'gamma' is no transform",
    "depth:gamma=0": "above 0",
    "depth:window=0.8-0.2": "lower value to a higher one",
    "depth:quantize=1": "two levels",
    "depth:quantize=" + 400 * "9": "no transform",
    "depth:invert;equalize": "no transform",
    "depth:map.png": "no transform",
    "sam": "'' is no value",
    "sam:": "'' is no value",
    "sam:0,": "'' is no value",
    "sam:1.5": "'1.5' is no value",
    "sam:1e-1": "no value",
    "sam:3=1": "'3' is no point",
    "sam:3,4": "'3' is no value",
    "sam:3,4=": "'' is no value",
    "sam:3,4=1;": "'' is no point",
    "sam:-3,4=1": "no point",
    "sam:3,4=1,5,6=0": "no value",
    "sam:rest=0": "one click",
    "sam:3,4=1;rest=0;rest=1": "at most one rest",
    "sam:3,4=1;rest=x": "'x' is no value",
}.items())  # fmt: skip
def test_a_malformed_spec_is_told_with_a_right_one(text, said):
    with pytest.raises(ValueError) as e:
        parse_spec(text)
    assert said in str(e.value) and text in str(e.value) and "\n" not in str(e.value)
    assert RIGHT[text.partition(":")[0]] in str(e.value)


def test_one_clear_line(tmp_path, capsys, folder, clicks, monkeypatch):
    monkeypatch.setattr(sample, "read_model", lambda *_: pytest.fail("the weights were read"))
    this = ["--image", MEADOW, "--prompt", "snow", "--out", tmp_path / "out.png", "--change-map"]
    here, empty = ["--networks", folder], ["--networks", tmp_path]
    assert "'flip' is no transform; say depth" in fails(capsys, *this, "depth:flip", *here)
    assert "'2' is no value in 0 .. 1; say sam" in fails(capsys, *this, "sam:1,1=2", *here)
    assert "outside the picture of 128x128" in fails(capsys, *this, "sam:128,1=0", *here)
    assert "no such file" in fails(capsys, *this, "depth.png")
    assert "no such file" in fails(capsys, *this, "./depth")
    assert "--change-map: the name is empty" in fails(capsys, *this, "")
    line = fails(capsys, *this, "depth", *empty)
    assert "dpt_large_384.pt" in line and str(tmp_path) in line and "--networks" in line
    assert "sam_vit_h_4b8939.pth" in fails(capsys, *this, CLICK, *empty)
    assert "sam_vit_h_4b8939.pth" in fails(capsys, "--collage", clicks, "--segments", "sam", *empty)
    assert "--networks needs" in fails(capsys, *this, MEADOW, *here)
    assert "--networks needs" in fails(capsys, "--collage", clicks, "--segments", "classical", *here)
    assert "--segments" in fails(capsys, *this, "depth", "--segments", "sam", *here)
    assert "--segments" in fails(capsys, "--prompt", "snow", "--segments", "classical")
    assert "invalid choice" in fails(capsys, "--collage", clicks, "--segments", "magic")
    (tmp_path / "dpt_large_384.pt").write_bytes((folder / "dpt_large_384.pt").read_bytes()[:5000])
    assert "damaged" in fails(capsys, *this, "depth", *empty)
    assert not list(tmp_path.glob("out*"))


def test_a_missing_network_is_told_before_another_one_runs(tmp_path, capsys, folder, clicks, monkeypatch):
    monkeypatch.setattr(published, "load", lambda *_: pytest.fail("a network was read"))
    (tmp_path / "sam_vit_b_01ec64.pth").symlink_to(folder / "sam_vit_b_01ec64.pth")
    this = ["--collage", clicks, "--segments", "sam", "--networks", tmp_path, "--out", tmp_path / "out.png"]
    assert "dpt_large_384.pt" in fails(capsys, *this, "--change-map", "depth")
