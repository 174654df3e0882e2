"""sample.py with wrong options, files and weights: each is one line, and nothing is written."""

import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import mfx
import sample
import sd
from checkpoints.magicfixup import INDEX
from editing import inputs, options
from tests import small
from tests.released import PlainMagicFixup, released_tensors
from tests.runs import GRADIENT, MEADOW, ROOT, fails, last_line, run, save, save_edit, save_random_fixup


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("evil was here"),)


def test_wrong_options_and_files(tmp_path, capsys):
    text, empty, half = tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "half.png"
    text.write_text("not a picture")
    empty.touch()
    half.write_bytes(Path(MEADOW).read_bytes()[:2000])
    Image.new("L", (50, 100)).save(tmp_path / "tall.png")
    edit = ["--image", MEADOW, "--prompt", "snow", "--out", tmp_path / "out.png", "--steps", 2]
    assert "no such file" in fails(capsys, "--image", tmp_path / "none.png", "--strength", 0.5)
    program = tmp_path / "program.png"  # to be run by Ghostscript, where that is there
    program.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    for bad in (text, empty, half, program):
        assert "not a picture" in fails(capsys, "--image", bad, "--strength", 0.5, "--out", tmp_path / "out.png")
        assert "not a picture" in fails(capsys, *edit, "--change-map", bad)
    assert "aspect" in fails(capsys, *edit, "--change-map", tmp_path / "tall.png")
    assert "--strength" in fails(capsys, *edit, "--strength", "1.5")
    assert "--steps" in fails(capsys, *edit, "--strength", 0.5, "--steps", 0)
    assert "--sampler" in fails(capsys, *edit, "--strength", 0.5, "--sampler", "magic")
    assert "--strength-fan" in fails(capsys, *edit, "--strength-fan", "0.2,2")
    assert "--softness" in fails(capsys, *edit, "--mask", GRADIENT, "--softness", -1)
    assert "--size" in fails(capsys, *edit, "--strength", 0.5, "--size", "big")
    assert "--softness" in fails(capsys, *edit, "--strength", 0.5, "--softness", 3)
    assert "--white-is-change" in fails(capsys, *edit, "--strength", 0.5, "--white-is-change")
    assert "--negative" in fails(capsys, *edit, "--strength", 0.5, "--negative", "sand", "--guidance", 1)
    assert "leaves --prompt out" in fails(capsys, *edit, "--strength", 0.5, "--guidance", 0)
    assert "not allowed with" in fails(capsys, *edit, "--strength", 0.5, "--change-map", GRADIENT)
    assert "--strength needs --image" in fails(capsys, "--strength", 0.5, "--prompt", "snow")
    assert "would squeeze it" in fails(capsys, *edit, "--mask", GRADIENT, "--paste-back", "--size", "192x64")
    assert "--sampler lcm, which has its own" in fails(capsys, *edit, "--strength", 0.5, "--sampler", "lcm",
                                                       "--spacing", "leading")
    assert "how much" in fails(capsys, *edit)
    assert "what to draw" in fails(capsys)
    assert ".png" in fails(capsys, *edit, "--strength", 0.5, "--out", tmp_path / "out.gif")
    assert "folder" in fails(capsys, *edit, "--strength", 0.5, "--out", tmp_path / "none" / "out.png")
    assert "at most 230 bytes" in fails(capsys, *edit, "--strength", 0.5, "--out", tmp_path / f"{'é' * 115}.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert "loop.png" in fails(capsys, "--image", tmp_path / "loop.png", "--strength", 0.5)
    for device in ("abacus", "meta"):
        assert "--device" in fails(capsys, *edit, "--strength", 0.5, "--device", device)
    assert "a name of its own" in fails(capsys, *edit, "--strength", 0.5, "--sheet", tmp_path / "out.png")
    there = tmp_path / "tall.png", tmp_path / ".." / tmp_path.name / "tall.png"
    assert "written over" in fails(capsys, "--image", there[0], "--strength", 0.5, "--out", there[1])
    assert "written over" in fails(capsys, *edit, "--change-map", there[0], "--sheet", there[1])
    for name in ("--image", "--edit", "--collage", "--weights", "--out"):  # an unset variable of a shell
        assert f"{name}: the name is empty" in fails(capsys, *edit, "--strength", 0.5, name, "")
    assert "--no-skip" in fails(capsys, "--prompt", "snow", "--no-skip", "--out", tmp_path / "out.png")
    assert str(tmp_path) in fails(capsys, *edit, "--strength", 0.5, "--weights", tmp_path / "none.safetensors")
    whole = (sample.TOY / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors" in fails(capsys, *edit, "--strength", 0.5, "--weights", tmp_path / "cut.safetensors")
    torch.save({"state_dict": RunsCode()}, tmp_path / "evil.ckpt")
    assert "could run code" in fails(capsys, *edit, "--strength", 0.5, "--weights", tmp_path / "evil.ckpt")
    assert not (tmp_path / "out.png").exists() and not list(tmp_path.glob(".*")) and not Path("evil was here").exists()


@pytest.mark.parametrize("values, option, said", [
    ([0, 1], "--mask", "lighter than 1 of 255, so all of it counts as about black"),
    ([0, 1], "--change-map", "if its values are 0 and 1, or labels, spread them"),
    ([1, 1], "--mask", "lighter than 1 of 255"),
    ([3, 9], "--change-map", "lighter than 9 of 255"),
    ([0, 100], "--mask", "values of 0 to 100, and a mask is cut at 127: all of it counts as black"),
    ([150, 255], "--mask", "counts as white"),
    ([255, 255], "--change-map", "keeps all of the picture"),
    ([0, 60, 120, 180, 255], "--mask", "--change-map keeps them"),
    ([0, 255], "--mask", None),
    ([0, 0], "--mask", None),
    ([90, 90], "--change-map", None),
    ([0, 60, 120, 180, 255], "--change-map", None),
])  # fmt: skip
@pytest.mark.parametrize("deep", [False, True])
def test_a_word_about_maps_that_hardly_mean_what_they_say(tmp_path, values, option, said, deep):
    hear(tmp_path, (np.array(values) * 257).astype(np.int32) if deep else np.uint8(values), option, said)


@pytest.mark.parametrize("white, kind", [(255, np.int32), (1, np.int32), (1, np.uint16), (0.001, np.float32)])
def test_a_deep_mask_that_is_nearly_black(tmp_path, white, kind):
    hear(tmp_path, np.array([0, white], kind), "--mask", "lighter than 1 of 255")


def test_a_coloured_map(tmp_path):
    hear(tmp_path, np.uint8([[255, 0, 0], [255, 255, 255]]), "--change-map", "only the grey counts")
    hear(tmp_path, np.uint8([[60, 90, 70], [255, 255, 255]]), "--change-map", None)


def test_a_picture_of_which_much_is_cut_is_told(recwarn):
    for size in ((128, 120), (400, 100)):
        _, args = options.parse(["--image", MEADOW, "--strength", "0.5"], "")
        inputs.fit_map(args, None, Image.new("RGB", (100, 100)), size)
    assert [str(w.message) for w in recwarn] == ["75% of the picture is cut off, for a size of 400x100"]


def test_a_deep_mask_of_the_other_byte_order(tmp_path):
    Image.frombytes("I;16B", (128, 128), np.full((128, 128), 200, ">u2").tobytes()).save(tmp_path / "map.tif")
    hear_of(tmp_path / "map.tif", "--mask", "lighter than 1 of 255")


def hear(tmp_path, values, option, said):
    """Columns of these values as a map or a mask: what is said of it, once, or nothing"""
    row = np.repeat(values, 128 // len(values) + 1, axis=0)[:128]
    hear_of(save(tmp_path / "map.tif", np.stack([row] * 128)), option, said)


def hear_of(path, option, said):
    softness = ["--softness", "0"] if option == "--mask" else []
    _, args = options.parse(["--image", MEADOW, option, str(path), "--prompt", "snow", *softness], "")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        inputs.read(args, torch.float32, torch.device("cpu"))
    assert len(found) == (said is not None) and (said or "") in "".join(str(w.message) for w in found)


def test_an_alpha_that_is_not_there(tmp_path, capsys):
    edit = ["--prompt", "snow", "--out", tmp_path / "out.png", "--mask", "alpha"]
    assert "has no alpha" in fails(capsys, "--image", MEADOW, *edit)
    assert "needs --image" in fails(capsys, *edit)
    collage = "--collage", ROOT / "examples/edits.json", "--change-map", "alpha", "--out", tmp_path / "out.png"
    assert "alpha is that of --image" in fails(capsys, *collage)


def test_other_trouble_in_one_line(tmp_path, capsys, monkeypatch):
    edit = ["--image", MEADOW, "--strength", 0.5, "--steps", 2, "--out", tmp_path / "out.png"]
    decode = sd.StableDiffusion.decode
    monkeypatch.setattr(sd.StableDiffusion, "decode", lambda self, z: decode(self, z) * torch.nan)
    assert "use --precision fp32" in last_line(capsys, *edit, "--precision", "bf16")
    assert "are damaged" in last_line(capsys, *edit, "--precision", "fp32")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to"), MemoryError()):
        monkeypatch.setattr(sd.StableDiffusion, "decode", mock.Mock(side_effect=error))
        assert "out of memory: try fewer --samples, a smaller --size" in last_line(capsys, *edit)
    edit += ["--steps", 10, "--weights", ROOT / "weights/toy-inpainting"]
    assert "needs --image and --mask" in fails(capsys, *edit)
    assert not (tmp_path / "out.png").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_fixup(tmp_path_factory.mktemp("weights") / "toy-mfx")


@pytest.fixture
def default_weights(folder, monkeypatch):
    monkeypatch.setattr(sample, "TOY_MFX", folder)


@pytest.fixture
def edit(tmp_path):
    return save_edit(tmp_path / "edit.png")


def test_wrong_options_and_files_of_magic_fixup(tmp_path, capsys, folder, edit):
    this = ["--image", MEADOW, "--edit", edit[0], "--out", tmp_path / "out.png", "--steps", 2]
    text, tall = tmp_path / "text.png", tmp_path / "tall.png"
    text.write_text("not a picture")
    Image.new("RGBA", (50, 100)).save(tall)
    nothing = save(tmp_path / "nothing.png", np.zeros((128, 128, 4), np.uint8))
    assert "not a picture" in fails(capsys, "--image", MEADOW, "--edit", text)
    assert "no such file" in fails(capsys, "--image", MEADOW, "--edit", tmp_path / "none.png")
    assert "edit is 50x100 and the picture 128x128" in fails(capsys, "--image", MEADOW, "--edit", tall)
    assert "transparent everywhere" in fails(capsys, "--image", MEADOW, "--edit", nothing)
    assert "--image" in fails(capsys, "--edit", edit[0])
    assert "not allowed with" in fails(capsys, *this, "--collage", "edits.json")
    for option in (["--prompt", "snow"], ["--negative", "snow"], ["--guidance", 7.5], ["--strength", 0.5],
                   ["--strength-fan", 3], ["--mask", GRADIENT], ["--prediction", "epsilon"]):
        assert f"{option[0]} does not go with --edit" in fails(capsys, *this, *option)
    assert "--samples" in fails(capsys, *this, "--samples", 0)
    assert "--a1111" in fails(capsys, *this, "--a1111")
    assert "aspect" in fails(capsys, *this, "--change-map", tall)
    assert "--white-is-change" in fails(capsys, *this, "--white-is-change")
    clash = ["--samples", 2, "--sheet", tmp_path / "out-1.png"]
    assert "each output needs a name of its own" in fails(capsys, *this, *clash)
    assert "--edit" in fails(capsys, "--image", MEADOW)  # it says what there is
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("segments, said", [
    ('[{"box": [2, 2, 9, 9], "edits": [{"translate": [500, 0]}]}]', "segment 1 ends up outside the picture"),
    ('[{"box": [0, 0, 128, 128], "edits": [{"delete": true}]}]', "transparent everywhere"),
    ("[{]", "line 2, column 16: not JSON"),
])  # fmt: skip
def test_a_collage_that_does_not_work(tmp_path, capsys, segments, said):
    (tmp_path / "edits.json").write_text(f'{{"image": "{MEADOW}",\n "segments": {segments}}}')
    assert said in fails(capsys, "--collage", tmp_path / "edits.json", "--out", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_what_a_collage_names_is_not_written_over(tmp_path, capsys):
    Image.open(MEADOW).save(tmp_path / "photo.png")
    Image.open(ROOT / "examples/ball.png").save(tmp_path / "ball.png")
    (tmp_path / "edits.json").write_text('{"image": "photo.png", "segments": [{"mask": "ball.png"}]}')
    before = (tmp_path / "photo.png").read_bytes()
    for out, sheet in (("photo.png", "sheet.png"), ("out.png", "ball.png")):
        argv = "--collage", tmp_path / "edits.json", "--out", tmp_path / out, "--sheet", tmp_path / sheet
        assert "would be written over" in fails(capsys, *argv)
    assert (tmp_path / "photo.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_weights_of_the_wrong_kind(tmp_path, capsys, folder, edit):
    this = ["--image", MEADOW, "--edit", edit[0], "--out", tmp_path / "out.png", "--weights"]
    assert "not a Magic Fixup" in fails(capsys, *this, sample.TOY)
    tensors = released_tensors(small.randomise(PlainMagicFixup()), small.stable_diffusion())
    torch.save(tensors, tmp_path / "released.pt")
    for weights in (folder, tmp_path / "released.pt"):
        assert "is a Magic Fixup" in fails(capsys, "--prompt", "snow", "--weights", weights)


def test_an_autoencoder_that_is_not_there(tmp_path, capsys, folder, edit):
    moved = tmp_path / "moved"
    mfx.save(mfx.load(folder, torch.float32), moved, torch.float16, vae=sample.TOY / "vae")
    (moved / INDEX).write_text('{"vae": "../toy/vae"}')
    line = fails(capsys, "--image", MEADOW, "--edit", edit[0], "--weights", moved)
    assert str(tmp_path / "toy" / "vae") in line and "no such folder" in line


def test_all_files_or_none(tmp_path, edit, default_weights, monkeypatch):
    saved, save = [], Image.Image.save

    def fails_at_the_second(self, file, *args, **options):
        saved.append(file)
        if len(saved) == 2:
            raise OSError("no space left on device")
        save(self, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", fails_at_the_second)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--image", MEADOW, "--edit", edit[0], "--samples", 2)
    assert stop.value.code == 2 and {f.name for f in tmp_path.iterdir()} == {"edit.png"}
