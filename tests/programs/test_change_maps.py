"""sample.py with computed change maps: random SAM and MiDaS, in files of the published layouts and names."""

import functools
import gc
import json
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sd
from checkpoints import published
from common.pictures import open_picture, tensor_to_picture, to_rgb
from editing import change_maps
from editing.change_maps import RIGHT, parse_spec
from networks import sam
from tests.networks import CLICK, write_clicks, write_tuned_networks
from tests.runs import MEADOW, fails, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tuned_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def one_network(monkeypatch):
    """A run and the test look with the same network of a kind, so that bits can be compared. Of weights at other
    addresses numbers are the same to a tolerance, and a pixel at a threshold may fall on its other side."""
    load = published.load
    once = functools.cache(lambda kind, file: load(kind, file, torch.float32))
    monkeypatch.setattr(published, "load", lambda kind, file, *_: once(kind, Path(file)))


@pytest.fixture
def maps_seen(monkeypatch, one_network):
    """-> a list that fills with the change maps that the model is given, in place of a model that looks at them"""
    seen = []

    def edit(model, prompt, picture, change_map, **_):
        seen.append(change_map)
        return picture / 2 + 0.5

    monkeypatch.setattr(sample, "edit", edit)
    return seen


def expected(folder, text, image, white_is_change=False):
    spec = change_maps.parse_spec(text)
    model = published.load(spec.network, published.find(spec.network, folder), torch.float32)
    return change_maps.compute_map(spec, np.asarray(image), model, white_is_change)


@pytest.mark.parametrize("text", ["depth", "depth:equalize,quantize=4", CLICK,
                                  pytest.param("sam:0,0.6", marks=pytest.mark.slow)])
def test_a_computed_map_is_used_as_the_same_map_drawn(tmp_path, folder, maps_seen, text):
    this = ["--image", MEADOW, "--prompt", "snow at night", "--networks", folder]
    run(tmp_path, *this, "--change-map", text, "--sheet", tmp_path / "sheet.png")
    mu = expected(folder, text, Image.open(MEADOW).convert("RGB"))
    assert torch.equal(maps_seen[0][0, 0], mu) and 0 < mu.std()
    tensor_to_picture(mu[None]).save(tmp_path / "map.png")
    run(tmp_path, *this[:-2], "--change-map", tmp_path / "map.png", "--sheet", tmp_path / "drawn.png")
    assert (maps_seen[1] - maps_seen[0]).abs().max() < 1 / 500
    sheet, drawn = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("sheet", "drawn"))
    assert sheet.shape == drawn.shape and np.abs(sheet[20:].astype(int) - drawn[20:]).max() <= 1
    assert json.loads(Image.open(tmp_path / "out.png").text["parameters"])["change_map"] == str(tmp_path / "map.png")


def turned(picture, path):
    exif = picture.getexif()
    exif[0x112] = 6  # shown turned clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def clear(picture, path):
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, picture.width).astype(np.uint8), (picture.height, 1))))
    picture.save(path)


@pytest.mark.parametrize("save", [turned, clear, lambda picture, path: picture.convert("L").save(path),
                                  lambda picture, path: picture.convert("P").save(path)])
def test_the_network_sees_the_picture_as_a_person_does(tmp_path, folder, maps_seen, save):
    """Upright, on white where transparent, in RGB. Clicks are in pixels of that; the map is cut as the picture is."""
    path = tmp_path / "in.png"
    save(Image.open(MEADOW).convert("RGB").resize((200, 300)), path)
    picture = to_rgb(open_picture(path))
    assert picture.size == (200, 300)
    this = ["--image", path, "--prompt", "snow", "--networks", folder, "--size", "64x64"]
    for text in ("depth", "sam:150,290=0"):
        run(tmp_path, *this, "--change-map", text)
        mu = expected(folder, text, picture)
        assert mu.shape == (300, 200) and maps_seen[-1].shape == (1, 1, 64, 64)
        want = cv2.resize(mu[50:250].numpy(), (64, 64), interpolation=cv2.INTER_AREA)  # the middle
        assert np.abs(maps_seen[-1][0, 0].numpy() - want).mean() < 0.02


def test_networks_run_once_and_are_gone_before_the_weights_are_read(tmp_path, folder, monkeypatch):
    alive, calls, load, encode, read = [], [], published.load, sam.SAM.encode, sd.load

    def watched(kind, path, dtype, device):
        assert dtype == torch.float32  # whatever the model's
        model = load(kind, path, dtype, device)
        alive.append(weakref.ref(model))
        calls.append("load")
        return model

    def looked(*args):
        gc.collect()
        assert alive and not any(model() for model in alive)
        return read(*args)

    monkeypatch.setattr(published, "load", watched)
    monkeypatch.setattr(sam.SAM, "encode", lambda *args: calls.append("encode") or encode(*args))
    monkeypatch.setattr(sd, "load", looked)
    this = ["--image", MEADOW, "--prompt", "snow", "--networks", folder, "--precision", "bf16"]
    run(tmp_path, *this, "--change-map", CLICK)
    assert calls == ["load", "encode"]


# --- Clicks in a collage --------------------------------------------------------------------------


@pytest.fixture
def clicks(tmp_path):
    return write_clicks(tmp_path)


@pytest.fixture
def edits_seen(monkeypatch, one_network):
    """-> a list that fills with what Magic Fixup is given: (reference, coarse, mask, change map)"""
    seen = []
    monkeypatch.setattr(sample, "fixup", lambda model, *given, **_: seen.append(given) or given[1] / 2 + 0.5)
    return seen


def test_who_resolves_clicks(tmp_path, folder, clicks, edits_seen, monkeypatch):
    model = published.load("sam", published.find("sam", folder), torch.float32)
    segment = sam.segmenter(model)(np.asarray(Image.open(tmp_path / "p.png")), (40, 60))
    assert 0.01 < segment.mean() < 0.99
    holes = segment & ~np.pad(segment, ((0, 0), (9, 0)))[:, :-9]  # moved to the right by 9
    run(tmp_path, "--collage", clicks, "--segments", "sam", "--networks", folder)
    assert np.array_equal(edits_seen[0][2][0, 0].numpy() == 0, holes)
    run(tmp_path, "--collage", clicks)
    run(tmp_path, "--collage", clicks, "--segments", "classical")
    assert torch.equal(edits_seen[1][2], edits_seen[2][2]) and not torch.equal(edits_seen[0][2], edits_seen[1][2])


def test_a_map_and_a_collages_clicks_share_one_look(tmp_path, folder, clicks, edits_seen, monkeypatch):
    looks, encode = [], sam.SAM.encode
    monkeypatch.setattr(sam.SAM, "encode", lambda *args: looks.append(args) or encode(*args))
    run(tmp_path, "--collage", clicks, "--segments", "sam", "--networks", folder, "--change-map", CLICK)
    assert len(looks) == 1
    want = expected(folder, CLICK, Image.open(tmp_path / "p.png"))
    assert torch.equal(edits_seen[0][3][0, 0], want)  # over the reference


# --- What is wrong is said in a line, before weights are read ---------------------------------------


@pytest.mark.parametrize("text, said", {
    "depth:": "'' is no transform",
    "depth:flip": "'flip' is no transform",
    "depth:gamma=0": "above 0",
    "depth:window=0.8-0.2": "lower value to a higher one",
    "depth:quantize=1": "two levels",
    "depth:quantize=" + 400 * "9": "no transform",
    "depth:invert;equalize": "no transform",
    "sam": "'' is no value",
    "sam:": "'' is no value",
    "sam:1.5": "'1.5' is no value",
    "sam:1e-1": "no value",
    "sam:3=1": "'3' is no point",
    "sam:3,4=": "'' is no value",
    "sam:3,4=1;": "'' is no point",
    "sam:-3,4=1": "no point",
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
