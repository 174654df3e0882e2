"""common/colours.py: a file's numbers mean what its profile says."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from common import colours, pictures
from tests.pictures import grey_profile, noise, swapped_profile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def greatest(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("size", [(48, 40), (24, 20)])
def test_what_a_model_sees_is_srgb(tmp_path, ending, size):
    flat = Image.new("RGB", (48, 40), (200, 100, 30))
    flat.save(tmp_path / f"in.{ending}", icc_profile=swapped_profile())
    x = pictures.picture_to_tensor(pictures.open_picture(tmp_path / f"in.{ending}"), size)
    seen = pictures.tensor_to_picture(x[0] / 2 + 0.5)
    assert greatest(seen, np.broadcast_to((100, 200, 30), (*size[::-1], 3))) <= 3  # JPEG's


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_there_and_back(mode):
    picture = Image.fromarray(noise()).convert(mode)
    if mode == "RGBA":
        picture.putalpha(77)
    picture.info["icc_profile"] = swapped_profile()
    own = np.array(picture)
    seen = colours.to_srgb(picture)
    assert "icc_profile" not in seen.info and np.array_equal(np.asarray(picture), own)
    assert greatest(np.asarray(seen), own[..., [1, 0, 2, 3][: len(mode)]]) <= 1  # and alpha with it
    if mode == "RGB":
        back = colours.from_srgb(seen, swapped_profile())
        assert greatest(back, own) <= 2 and back.info["icc_profile"] == swapped_profile()


def test_numbers_that_are_srgb_already_stay():
    """Most cameras embed sRGB: nothing may become one level darker of it."""
    for mode, profile in (("RGB", SRGB), ("L", grey_profile()), ("RGB", None), ("RGB", b"")):
        assert colours.colour_transform(profile, mode) is None
    picture = Image.fromarray(noise())
    assert np.array_equal(np.asarray(colours.from_srgb(picture, SRGB)), noise())


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_of_another_curve(mode):
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.info["icc_profile"] = grey_profile(gamma=1.2)
    linear = ((grey / 255 + 0.055) / 1.055) ** 1.2
    want = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    seen = np.asarray(pictures.to_rgb(picture), float)[..., 0]
    assert np.abs(seen - want)[:, 32:].max() < 2  # below, both curves have a straight piece


def test_a_profile_that_cannot_be_followed_is_told_and_left_out():
    for profile in (b"no profile", SRGB.replace(b"RGB ", b"CMYK", 1)):
        picture = Image.fromarray(noise())
        picture.info["icc_profile"] = profile
        assert np.array_equal(np.asarray(colours.to_srgb(picture)), noise())
    with pytest.warns(UserWarning, match="cannot be followed"):
        colours.colour_transform(SRGB[:16] + b"RGB " + bytes(100), "RGB")


def test_a_maps_greys_are_numbers():
    picture = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1)))
    picture.info["icc_profile"] = grey_profile(gamma=1.2)
    assert np.array_equal(np.asarray(pictures.map_to_grey(picture)), np.asarray(picture))
