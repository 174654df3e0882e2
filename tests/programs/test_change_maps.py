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
from networks import sam
from tests.runs import MEADOW, run
from tests.small_networks import CLICK, write_clicks, write_networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_networks(tmp_path_factory.mktemp("networks"))


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


def test_an_edit_under_a_computed_map(tmp_path, folder):
    """The whole way, with the toy: what the map keeps, stays."""
    this = ["--image", MEADOW, "--prompt", "snow at night", "--networks", folder, "--change-map"]
    mu = expected(folder, "depth:equalize,window=0.4-0.6", Image.open(MEADOW).convert("RGB")).numpy()
    back = run(tmp_path, "--image", MEADOW, "--prompt", "snow at night", "--strength", 0)
    change = np.abs(run(tmp_path, *this, "depth:equalize,window=0.4-0.6") - back).mean(2)
    assert change[mu == 0].mean() > 2 * change[mu == 1].mean()
    parameters = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert parameters["change_map"] == "depth:equalize,window=0.4-0.6" and parameters["networks"] == str(folder)


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

    def watched(*args):
        model = load(*args)
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
    run(tmp_path, "--image", MEADOW, "--prompt", "snow", "--networks", folder, "--change-map", CLICK)
    assert calls == ["load", "encode"]


# Clicks in a collage


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
