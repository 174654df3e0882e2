"""common/pictures.py: files that are no pictures, and pictures that do not fit."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import pictures
from tests.runs import MEADOW, fails


def test_a_picture_with_damaged_exif_is_told(tmp_path, capsys):
    exif, plain = b"MM\0*", Path(MEADOW).read_bytes()  # a header that ends too soon
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    (tmp_path / "in.png").write_bytes(plain[:33] + chunk + plain[33:])  # after the first chunk
    said = fails(capsys, "--image", tmp_path / "in.png", "--strength", 0.5, "--out", tmp_path / "out.png")
    assert "not a picture that can be read" in said


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


def test_what_is_drawn_over_another_picture():
    original, tall = Image.new("RGB", (100, 100)), Image.new("RGBA", (50, 100))
    with pytest.raises(ValueError, match="the map is 50x100 and the picture 100x100.* aspect"):
        pictures.map_over(tall, original)
    with pytest.raises(ValueError, match="the edit is 50x100"):
        pictures.fit_edit(tall, original, (64, 64))
    with pytest.raises(ValueError, match="transparent everywhere"):
        pictures.fit_edit(Image.new("RGBA", (100, 100)), original, (64, 64))
