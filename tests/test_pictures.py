"""common/pictures.py: whatever the file, the picture that a person sees; maps and edits lie where it has them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import pictures
from tests.runs import MEADOW


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
def test_any_picture_mode(tmp_path, mode):
    """Means over 8x8 blocks, for the dither."""
    rgb = Image.open(MEADOW).convert("RGB").resize((96, 64))
    grey = np.asarray(rgb.convert("L"))
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)
    path = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    picture.save(path)
    read = pictures.to_rgb(pictures.open_picture(path))
    assert read.mode == "RGB" and read.size == (96, 64)
    want = rgb if mode in ("P", "RGBA", "CMYK") else Image.fromarray(grey).convert("RGB")
    read, want = (np.asarray(x, float).reshape(8, 8, 12, 8, 3).mean((1, 3)) for x in (read, want))
    assert np.abs(read - want).mean() < (5 if mode in ("P", "1") else 0.1)


def test_transparent_shows_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (255, 0, 0, 0))
    assert np.asarray(pictures.to_rgb(picture)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_16_bit_grey_keeps_its_tones():
    ramp = np.linspace(0, 65535, 128).astype(np.uint16)
    for deep in (ramp, (ramp / 65535).astype(np.float32)):  # the second as depth maps are often stored
        picture = pictures.to_rgb(Image.fromarray(np.tile(deep, (128, 1))))
        assert np.abs(np.asarray(picture)[0, :, 0] - np.linspace(0, 255, 128)).max() <= 1


def test_exif_rotation_is_undone(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    exif = picture.getexif()
    exif[0x112] = 6  # the camera was held upright
    picture.save(tmp_path / "in.jpg", exif=exif)
    assert pictures.open_picture(tmp_path / "in.jpg").size == (20, 40)


def test_fitted_size_keeps_aspect_and_area():
    assert pictures.fitted_size(Image.new("L", (90, 60)), 128, 8) == (160, 104)
    assert pictures.fitted_size(Image.new("L", (90, 60)), (64, 32), 8) == (64, 32)
    assert pictures.fitted_size(None, 512, 8) == (512, 512)
    assert pictures.fitted_size(Image.new("L", (9000, 1)), 64, 8)[1] == 8


def test_map_follows_the_picture_when_it_is_cut():
    """A size of another aspect cuts picture and map at the same place."""
    half = Image.fromarray(np.repeat([[0, 255]], 100, 0).repeat(100, 1).astype(np.uint8))
    size = (64, 128)
    x = pictures.picture_to_tensor(half.convert("RGB"), size)
    mu = pictures.map_to_tensor(pictures.map_over(half, half), size)
    assert x.shape == (1, 3, 128, 64) and mu.shape == (1, 1, 128, 64)
    assert np.abs((x[0, 0] / 2 + 0.5 - mu[0, 0]).numpy()).mean() < 0.02
    assert torch.equal(pictures.map_over(half, half, white_is_change=True), 1 - pictures.map_over(half, half))


def test_tensors_and_pictures_go_both_ways():
    x = pictures.picture_to_tensor(Image.open(MEADOW), (128, 128))
    back = pictures.tensor_to_picture(x[0] / 2 + 0.5)
    assert torch.equal(pictures.picture_to_tensor(back, (128, 128)), x)


def test_labels_stand_over_their_columns(tmp_path):
    sheet = pictures.labelled([Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 40))], ["a\nb", 40 * "long"])
    assert sheet.size == (82, 54) and sheet.getpixel((0, 53)) == (255, 0, 0)
    columns = pictures.labelled_columns(Image.open(MEADOW).convert("RGB"), ["0.5", "1"])
    assert columns.size == (128, 142)
    assert np.array_equal(np.asarray(columns)[14:], np.asarray(Image.open(MEADOW).convert("RGB")))
    pictures.save_picture(columns, tmp_path / "x.png", {"seed": 3})
    assert json.loads(Image.open(tmp_path / "x.png").text["parameters"]) == {"seed": 3}
