"""common/pictures.py: whatever the file, the picture that a person sees; maps and edits lie where it has them. Axes."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFont, PngImagePlugin, TiffImagePlugin, TiffTags

from common import colours, pictures
from common.canvas import round_ticks
from tests.pictures import grey_profile, noise, swapped_profile
from tests.runs import MEADOW, fails


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


def test_16_bit_grey_of_which_one_tone_is_transparent(tmp_path):
    deep = np.array([[30000, 30001, 30002]], np.uint16)  # of 8 bits all are 117
    Image.fromarray(deep).save(tmp_path / "in.png", transparency=30001)
    picture = pictures.open_picture(tmp_path / "in.png")
    assert np.asarray(pictures.to_rgba(picture))[0].tolist() == [[117] * 3 + [alpha] for alpha in (255, 0, 255)]
    for read in (pictures.to_rgb, pictures.map_to_grey):
        assert np.asarray(read(picture).convert("L"))[0].tolist() == [117, 255, 117]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_8_bits_in_a_file_of_more_are_told(kind):
    with pytest.warns(UserWarning, match="in which white is 65535, and nothing above 255"):
        pictures.to_rgb(Image.fromarray(np.array([[0, 255]], kind)))


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
    sheet = pictures.labelled([Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 40))], ["a\nb", 10**5 * "long"])
    assert sheet.size == (82, 54) and sheet.getpixel((0, 53)) == (255, 0, 0)
    columns = pictures.labelled_columns(Image.open(MEADOW).convert("RGB"), ["0.5", "1"])
    assert columns.size == (128, 142)
    photo = Image.new("RGB", (20, 10))
    photo.info["icc_profile"] = SRGB  # its numbers are kept, and so is what they mean
    assert pictures.labelled_columns(photo, ["1"]).info["icc_profile"] == SRGB
    assert np.array_equal(np.asarray(columns)[14:], np.asarray(Image.open(MEADOW).convert("RGB")))


def test_parts_of_a_map_that_were_not_drawn_are_kept():
    """Whatever colour lies beneath, and whichever way the map is read."""
    layer = Image.fromarray(np.dstack([noise(), np.zeros((40, 48), np.uint8)]))
    layer.paste((255, 255, 255, 255), (0, 0, 10, 40))
    layer.paste((0, 0, 0, 255), (10, 0, 20, 40))
    layer.paste((255, 255, 255, 51), (20, 0, 30, 40))  # a fifth white
    layer.paste((0, 0, 0, 51), (30, 0, 40, 40))  # a fifth black
    for white_is_change, want in ((False, [1, 0, 1, 0.8, 1]), (True, [0, 1, 0.8, 1, 1])):
        mu = pictures.map_over(layer, Image.new("RGB", (48, 40)), white_is_change)
        assert mu[0, [5, 15, 25, 35, 45]].tolist() == pytest.approx(want, abs=0.01)
    indexed = Image.new("P", (48, 40))
    indexed.putpalette([0, 0, 0, 255, 255, 255])
    indexed.info["transparency"] = 0
    assert pictures.map_over(indexed, indexed, white_is_change=True).min() == 1


def test_a_map_is_read_by_strips_as_at_once(monkeypatch):
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 4), np.uint8))
    whole = [np.asarray(f(rgba)) for f in (pictures.to_rgb, pictures.to_rgba, pictures.map_to_grey)]
    monkeypatch.setattr(pictures, "STRIP", 7)
    for was, f in zip(whole, (pictures.to_rgb, pictures.to_rgba, pictures.map_to_grey)):
        assert np.array_equal(was, np.asarray(f(rgba)))


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "profile"])
def test_much_text_in_a_png(tmp_path, kind):
    """As ComfyUI's workflows, and what editors keep of a picture's history."""
    note, more = PngImagePlugin.PngInfo(), {}
    if kind == "profile":
        more["icc_profile"] = zlib.compress(b"", 0) * 300_000
    elif kind == "iTXt":
        note.add_itxt("XML:com.adobe.xmp", "x{}" * 700_000, zip=True)
    else:
        note.add_text("workflow", "x{}" * 700_000, zip=kind == "zTXt")
    Image.fromarray(noise()).save(tmp_path / "in.png", pnginfo=note, **more)
    assert np.array_equal(np.asarray(pictures.to_rgb(pictures.open_picture(tmp_path / "in.png"))), noise())


@pytest.mark.slow
def test_a_photograph_of_182_megapixels(tmp_path, recwarn):
    Image.new("L", (14000, 13000), 200).save(tmp_path / "in.png", compress_level=1)
    picture = pictures.to_rgb(pictures.open_picture(tmp_path / "in.png"))
    assert picture.size == (14000, 13000) and not recwarn.list
    assert pictures.picture_to_tensor(picture, (64, 64)).mean() == pytest.approx(200 / 127.5 - 1)


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp"])
def test_saved_by_the_names_ending_with_parameters_and_profile(tmp_path, ending):
    picture = Image.open(MEADOW).convert("RGB")
    picture.info = {"icc_profile": b"a profile"}
    path = tmp_path / f"x.{ending}"
    pictures.save_picture(picture, path, {"prompt": "雪 at night", "long": "long " * 20_000})
    saved = Image.open(path)
    assert saved.format == {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG")
    assert saved.info["icc_profile"] == b"a profile"
    assert np.abs(np.asarray(saved, int) - np.asarray(picture, int)).mean() < 4
    if ending == "png":
        assert json.loads(saved.text["parameters"])["prompt"] == "雪 at night"
    else:
        note = saved.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert note.startswith(b'ASCII\0\0\0{"prompt": "\\u96ea at night", "long": "long ')


def test_small_pictures_are_enlarged_for_a_sheet():
    red = Image.new("RGB", (100, 40), "red")
    assert pictures.enlarge(red) == Image.new("RGB", (300, 120), "red")
    large = Image.new("RGB", (256, 40))
    assert pictures.enlarge(large) is large


def test_a_sheet_too_long_for_its_format_is_made_smaller(tmp_path):
    pictures.save_picture(Image.new("RGB", (20_000, 10)), tmp_path / "x.webp", {})
    assert Image.open(tmp_path / "x.webp").size == (16383, 8)


def test_a_label_is_drawn_by_a_font_that_has_it_or_left_out(monkeypatch):
    """Pillow's own font has ASCII alone, and others are those of the machine: here one is made of it."""
    own, tried, truetype = ImageFont.load_default(), [], ImageFont.truetype

    class Font:
        def getmask(self, letter):
            return b"box" if letter == "\U0010ffff" or letter not in "雪 at" else letter.encode()

    def made_here(name, *args, **more):
        if not isinstance(name, str):  # Pillow's own
            return truetype(name, *args, **more)
        tried.append(name)
        if name == "none.ttf":
            raise OSError("cannot open resource")
        return Font()

    monkeypatch.setattr(ImageFont, "truetype", made_here)
    assert isinstance(pictures.find_font("雪 at", 12), Font)
    assert isinstance(pictures.find_font("snow", 12), type(own)) and len(tried) == 1
    monkeypatch.setattr(pictures, "FONTS", ("none.ttf",))
    with pytest.warns(UserWarning, match="no font here has all letters of '雪'"):
        sheet = pictures.labelled([Image.new("RGB", (90, 40), "red")], ["雪"])
    assert np.asarray(sheet)[:14].min() == 255


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_a_film_is_told_and_its_first_frame_taken(tmp_path, ending, recwarn):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime")]
    for n in (1, 2):
        frames[0].save(tmp_path / f"in.{ending}", save_all=True, append_images=frames[1:n])
        assert greatest(pictures.to_rgb(pictures.open_picture(tmp_path / f"in.{ending}")), frames[0]) < 3
        assert ["more than one frame" in str(w.message) for w in recwarn] == [True] * (n - 1)


def test_a_picture_with_damaged_exif_is_told(tmp_path, capsys):
    exif, plain = b"MM\0*", Path(MEADOW).read_bytes()  # a header that ends too soon
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    (tmp_path / "in.png").write_bytes(plain[:33] + chunk + plain[33:])  # after the first chunk
    said = fails(capsys, "--image", tmp_path / "in.png", "--strength", 0.5, "--out", tmp_path / "out.png")
    assert "not a picture that can be read" in said


def test_a_profile_that_is_none_is_dropped(tmp_path):
    """A TIFF may say it as a number."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[34675], tags.tagtype[34675] = 5, TiffTags.LONG
    Image.fromarray(noise()).save(tmp_path / "in.tif", tiffinfo=tags)
    assert Image.open(tmp_path / "in.tif").info["icc_profile"] == 5
    assert np.array_equal(np.asarray(pictures.to_rgb(pictures.open_picture(tmp_path / "in.tif"))), noise())


def test_indexed_colours_without_their_palette_are_told(tmp_path):
    """As Pillow reads them from an icon."""
    Image.open(MEADOW).convert("P").save(tmp_path / "in.icns")
    with pytest.raises(ValueError, match="in.icns is not a picture that can be read .its palette is missing"):
        pictures.open_picture(tmp_path / "in.icns")


def test_no_picture_at_all(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    for name, said in (("text.png", "not a picture"), ("none.png", "no such file"), ("", "not a picture")):
        with pytest.raises(ValueError, match=said):
            pictures.open_picture(tmp_path / name)


def test_a_picture_for_which_no_memory_suffices(tmp_path):
    """By its header alone, before anything is unpacked."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "in.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT")
    with pytest.raises(ValueError, match="in.png has more than 268 megapixels"):
        pictures.open_picture(tmp_path / "in.png")


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan])
def test_grey_out_of_its_range(value):
    with pytest.raises(ValueError, match="values in 0 .. 1, not"):
        pictures.to_rgb(Image.fromarray(np.full((4, 4), value, np.float32)))


def test_grey_out_of_its_range_is_told_with_the_name_of_the_file(tmp_path):
    Image.fromarray(np.full((4, 4), 255, np.float32)).save(tmp_path / "map.tif")
    for read in (pictures.to_rgb, pictures.map_to_grey):
        with pytest.raises(ValueError, match=r"map\.tif, of mode F, .* not 255 .. 255: save it with 8 bits"):
            read(pictures.open_picture(tmp_path / "map.tif"))


def test_what_is_drawn_over_another_picture():
    original, tall = Image.new("RGB", (100, 100)), Image.new("RGBA", (50, 100))
    with pytest.raises(ValueError, match="the map is 50x100 and the picture 100x100.* aspect"):
        pictures.map_over(tall, original)
    with pytest.raises(ValueError, match="the edit is 50x100"):
        pictures.fit_edit(tall, original, (64, 64))
    with pytest.raises(ValueError, match="transparent everywhere"):
        pictures.fit_edit(Image.new("RGBA", (100, 100)), original, (64, 64))


# --- common/colours.py: a file's numbers mean what its profile says --------------------------------

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


def test_ticks_are_round_and_0_is_one_of_them():
    assert round_ticks(0, 8.65, 4) == [0, 2, 4, 6, 8]
    assert round_ticks(-3, 3, 5) == [-2, 0, 2]
    assert round_ticks(1000, 0, 5) == [0, 200, 400, 600, 800, 1000]
    assert round_ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert 0 in round_ticks(-0.003, 0.0071, 5)
