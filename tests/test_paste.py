"""--paste-back: what the map keeps is the photograph's own, at its own size."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common.pictures import picture_to_tensor
from editing import inputs, paste
from tests.pictures import grey_profile, swapped_profile
from tests.runs import fails, last_line, run

SIZE = 160, 104  # as the toy sees 3:2


def random_photo(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def ramp_map(width, height):
    """0 on the left, 1 on the right, a third of the width each"""
    return torch.linspace(-1, 2, width).clamp(0, 1).expand(1, 1, height, width)


def test_the_photograph_where_the_map_is_white_the_result_where_it_is_not():
    photo, mu = random_photo(300, 200), ramp_map(300, 200)
    small, coarse, small_map, over_photo = paste.prepare(photo, None, mu, SIZE)
    assert small.size == SIZE and coarse is None and small_map.shape == (1, 1, 104, 160)
    result = Image.new("RGB", SIZE, (10, 200, 30))
    x, own = (np.asarray(p).astype(int) for p in (over_photo(result), photo))
    kept = mu[0, 0].numpy() == 1
    assert x.shape == own.shape and (x[kept] == own[kept]).all() and kept.mean() > 0.3
    changed = mu[0, 0].numpy() <= 1 - paste.FEATHER
    assert (x[changed] == (10, 200, 30)).all()
    seam = ~kept & ~changed  # straight from one to the other
    weight = (1 - mu[0, 0].numpy()[seam])[:, None] / paste.FEATHER
    np.testing.assert_allclose(x[seam], weight * (10, 200, 30) + (1 - weight) * own[seam], atol=1.5)


def test_the_model_sees_the_whole_photograph():
    """Elsewhere it is cut to multiples of the autoencoder's factor; here an edge would stay behind."""
    edges = np.zeros((200, 300, 3), np.uint8)
    edges[:3], edges[-3:] = 255, 255
    small, *_ = paste.prepare(Image.fromarray(edges), None, torch.zeros(1, 1, 200, 300), SIZE)
    assert np.asarray(small)[[0, -1]].min() > 150


def test_an_edits_own_pixels_are_kept_and_its_holes_are_not():
    photo = random_photo(300, 200)
    pixels = np.dstack([255 - np.asarray(photo), np.full((200, 300), 255, np.uint8)])
    pixels[50:100, 50:100, 3] = 0
    _, coarse, _, over_photo = paste.prepare(photo, Image.fromarray(pixels), torch.ones(1, 1, 200, 300), SIZE)
    assert coarse.size == SIZE and coarse.mode == "RGBA"
    x = np.asarray(over_photo(Image.new("RGB", SIZE, (1, 2, 3))))
    hole = pixels[..., 3] == 0
    assert (x[hole] == (1, 2, 3)).all() and (x[~hole] == pixels[~hole][:, :3]).all()


def test_the_result_is_taken_into_the_photographs_colours():
    """Its own numbers are kept; beside them the same colour has the same numbers. The model sees sRGB."""
    photo = Image.new("RGB", (30, 20), (200, 100, 30))
    photo.info["icc_profile"] = swapped_profile()
    small, *_, over_photo = paste.prepare(photo, None, ramp_map(30, 20), (24, 16))
    seen = ((picture_to_tensor(small, (24, 16))[0] + 1) * 127.5).mean((1, 2))
    np.testing.assert_allclose(seen, (100, 200, 30), atol=1)
    x = np.asarray(over_photo(Image.new("RGB", (24, 16), (100, 200, 30))), int)
    assert np.abs(x - (200, 100, 30)).max() <= 1 and (x[:, 20:] == (200, 100, 30)).all()


def test_an_edit_is_kept_with_its_own_profile():
    photo, edit = Image.new("RGB", (30, 20), (9, 9, 9)), Image.new("RGBA", (30, 20), (200, 100, 30, 255))
    edit.info["icc_profile"] = swapped_profile()
    *_, over_photo = paste.prepare(photo, edit, torch.ones(1, 1, 20, 30), (24, 16))
    pasted = over_photo(Image.new("RGB", (24, 16)))
    assert pasted.getpixel((5, 5)) == (200, 100, 30) and pasted.info["icc_profile"] == swapped_profile()


def test_a_profile_without_a_way_back_ends_in_srgb(monkeypatch):
    """As of some scanners: it leads to sRGB and not from there."""
    build = ImageCms.buildTransform

    def one_way(source, target, *args, **more):
        if isinstance(target, ImageCms.ImageCmsProfile):
            raise ImageCms.PyCMSError("cannot build transform")
        return build(source, target, *args, **more)

    monkeypatch.setattr(ImageCms, "buildTransform", one_way)
    monkeypatch.setattr(paste, "colour_transform", paste.colour_transform.__wrapped__)
    photo = Image.new("RGB", (30, 20), (200, 100, 30))
    photo.info["icc_profile"] = swapped_profile()
    *_, over_photo = paste.prepare(photo, None, torch.ones(1, 1, 20, 30), (24, 16))
    pasted = over_photo(Image.new("RGB", (24, 16)))
    assert "icc_profile" not in pasted.info
    np.testing.assert_allclose(pasted.getpixel((5, 5)), (100, 200, 30), atol=1)


@pytest.mark.parametrize("profile", [swapped_profile()[:200], b"RGB".rjust(19) + b" ", b"none"])
def test_a_damaged_profile_is_no_reason_to_refuse(profile):
    photo = random_photo(30, 20)
    photo.info["icc_profile"] = profile
    *_, over_photo = paste.prepare(photo, None, torch.ones(1, 1, 20, 30), (24, 16))
    pasted = over_photo(Image.new("RGB", (24, 16)))
    assert np.array_equal(np.asarray(pasted), np.asarray(photo)) and not pasted.info


def grey_with_profile(photo):
    photo = photo.convert("L")
    photo.info["icc_profile"] = grey_profile(gamma=1.2)
    return photo


@pytest.mark.parametrize("change, lost", [
    (lambda p: p.convert("CMYK"), "mode CMYK"), (lambda p: Image.new("I;16", p.size), "mode I;16"),
    (grey_with_profile, "profile of grey"), (lambda p: p.putalpha(9) or p, "transparency"),
    (lambda p: p.convert("RGBA"), None), (lambda p: p.convert("L"), None), (lambda p: p.convert("P"), None),
])  # fmt: skip
def test_what_of_a_photograph_cannot_be_kept_is_told(recwarn, change, lost):
    photo = change(random_photo(30, 20))
    inputs.warn_of_loss(photo, "photo.tif", repainted=False)
    assert [f"does not keep the {lost} of photo.tif" in str(w.message) for w in recwarn] == [True] * bool(lost)


@pytest.mark.parametrize("kind", ["image", "collage"])
def test_a_photograph_in_other_colours_on_the_command_line(tmp_path, kind):
    photo, mask = random_photo(300, 200), np.full((200, 300), 255, np.uint8)
    photo.save(tmp_path / "photo.png", icc_profile=swapped_profile())
    mask[50:150, 50:150] = 0
    Image.fromarray(mask).save(tmp_path / "map.png")
    words = ["--image", tmp_path / "photo.png", "--prompt", "a red ball"]
    if kind == "collage":
        words = ["--collage", tmp_path / "edits.json"]
        (tmp_path / "edits.json").write_text('{"image": "photo.png", "segments": [{"box": [60, 60, 90, 90]}]}')
    x = run(tmp_path, *words, "--change-map", tmp_path / "map.png", "--paste-back")
    assert (x[mask == 255] == np.asarray(photo)[mask == 255]).all()
    assert Image.open(tmp_path / "out.png").info["icc_profile"] == swapped_profile()


@pytest.mark.parametrize("edit", ["mask", "edit"])
def test_a_photograph_lying_on_its_side_comes_back_upright_at_its_own_size(edit, tmp_path):
    photo, mask = random_photo(300, 420), np.full((300, 420), 255, np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: 420 x 300 pixels in the file's sense are 300 x 420
    photo.save(tmp_path / "photo.png", exif=turned)
    mask[100:200, 100:200] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--mask", tmp_path / "mask.png", "--softness", "0", "--prompt", "a red ball"]
    if edit == "edit":
        photo.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "edit.png")
        words = ["--edit", tmp_path / "edit.png", "--change-map", tmp_path / "mask.png"]
    x = run(tmp_path, "--image", tmp_path / "photo.png", *words, "--paste-back")
    own = np.asarray(photo.transpose(Image.Transpose.ROTATE_270))
    assert x.shape == (300, 420, 3) and (x[mask == 255] == own[mask == 255]).all()
    assert (x[mask == 0] != own[mask == 0]).any(1).mean() > 0.9


def test_a_photograph_that_the_format_cannot_hold(capsys, tmp_path):
    """Before the edit: nothing is computed in vain."""
    Image.new("L", (17_000, 20)).save(tmp_path / "photo.png")
    words = "--image", tmp_path / "photo.png", "--strength", 0.5, "--paste-back", "--out", tmp_path / "out.webp"
    assert "does not hold 17000 x 20 pixels, say .png" in fails(capsys, *words)


def test_it_needs_something_to_keep(capsys, tmp_path):
    out = tmp_path / "out.png"
    assert "--paste-back needs" in last_line(capsys, "--prompt", "a ball", "--paste-back", "--out", out)
    assert not out.exists()
