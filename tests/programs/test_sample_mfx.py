"""sample.py as a command: Magic Fixup, on an untrained one made of the toy."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mfx
import sample
import sd
from editing.edits_json import read_edits
from kernels import winograd
from tests import small
from tests.runs import GRADIENT, MEADOW, fails, run, save, save_edit, save_random_fixup


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_random_fixup(tmp_path_factory.mktemp("weights") / "toy-mfx")
    return winograd.quicken(mfx.load(folder, torch.float32)), folder  # as sample.py does on a CPU


@pytest.fixture(autouse=True)
def default_weights(model, monkeypatch):
    monkeypatch.setattr(sample, "TOY_MFX", model[1])


@pytest.fixture
def edit(tmp_path):
    return save_edit(tmp_path / "edit.png")


# --- What comes out -------------------------------------------------------------------------------


def test_samples_sheet_strip_and_parameters(tmp_path, model, edit):
    argv = ["--image", MEADOW, "--edit", edit[0]]
    run(tmp_path, *argv, "--samples", 3, "--seed", 5, "--sheet", tmp_path / "sheet.png", "--steps-strip",
        tmp_path / "strip.png", "--change-map", GRADIENT, "--steps", 4)
    made = {"edit.png", "out-5.png", "out-6.png", "out-7.png", "sheet.png", "strip.png"}
    assert {f.name for f in tmp_path.iterdir()} == made
    third = Image.open(tmp_path / "out-7.png")
    said = json.loads(third.text["parameters"])
    assert said["seed"] == 7 and said["edit"] == str(edit[0]) and said["steps"] == 4 and "guidance" not in said
    assert Path(said["weights"]) == model[1]
    alone = run(tmp_path, *argv, "--seed", 7, "--change-map", GRADIENT)
    assert np.abs(alone - np.asarray(third, int)).max() <= 1  # a sample depends on its seed alone
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 6 * 256 + 5 * 2  # reference, coarse edit, map, three results; all enlarged
    hole = np.asarray(sheet)[-256:, 258:514][140:180, 60:100]
    assert (hole == hole[..., :1]).all() and {190, 255} <= set(np.unique(hole))  # a checkerboard
    assert Image.open(tmp_path / "strip.png").width == 4 * 128 + 3 * 2


def test_defaults_are_the_paper_s(tmp_path, edit, monkeypatch):
    seen = {}
    monkeypatch.setattr(sample, "fixup", lambda *_, **options: seen.update(options) or torch.zeros(1, 3, 8, 8))
    sample.main(["--image", MEADOW, "--edit", str(edit[0]), "--out", str(tmp_path / "out.png")])
    assert seen["steps"] == 50 and seen["sampler"] == "ddim" and list(seen["seeds"]) == [0]


# --- What goes in ---------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """-> a list that fills with what the model is given: (reference, coarse, mask, change_map)"""
    seen = []

    def fixup(model, *given, **_):
        seen.append(given)
        return given[1] / 2 + 0.5

    monkeypatch.setattr(sample, "fixup", fixup)
    return seen


def test_reference_edit_mask_and_map_are_cut_alike(tmp_path, shown):
    """An edit that changes nothing is the reference, pixel by pixel; alpha is a map drawn at that place."""
    rgb = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    alpha = np.where(np.arange(100) < 47, 255, 0).astype(np.uint8) * np.ones((60, 1), np.uint8)
    picture = save(tmp_path / "p.png", rgb)
    whole, half = save(tmp_path / "whole.png", rgb), save(tmp_path / "half.png", np.dstack([rgb, alpha]))
    for size in ([], ["--size", "64x96"], ["--size", "200x104"]):
        run(tmp_path, "--image", picture, "--edit", whole, *size)
        reference, coarse, mask, change_map = shown[-1]
        assert torch.equal(reference, coarse) and mask.all() and mask.shape == (1, 1, *coarse.shape[2:])
        assert change_map is None
        run(tmp_path, "--image", picture, "--edit", half, "--change-map", save(tmp_path / "map.png", alpha), *size)
        _, coarse, mask, change_map = shown[-1]
        assert torch.equal(change_map > 0.5, mask > 0) and set(mask.unique().tolist()) <= {0, 1}
        edge = int(mask[0, 0, 0].sum())
        assert torch.equal(coarse[..., : edge - 12], reference[..., : edge - 12])  # past the reach of the filters


def test_an_edit_at_another_resolution_is_fitted(tmp_path, edit, shown):
    Image.open(edit[0]).resize((320, 320), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    run(tmp_path, "--image", MEADOW, "--edit", edit[0])
    run(tmp_path, "--image", MEADOW, "--edit", tmp_path / "large.png")
    (_, coarse, mask, _), (_, large, large_mask, _) = shown
    assert (coarse - large).abs().mean() < 0.02 and (mask != large_mask).float().mean() < 0.01


@pytest.mark.parametrize("size", [(128, 128), (90, 90)])
def test_the_colour_of_a_hole_is_never_seen(tmp_path, edit, shown, size):
    """Whatever lies under alpha 0, at the model's size or resampled to it."""
    for i, colour in enumerate([(0, 0, 0), (255, 0, 255)]):
        x = np.asarray(Image.fromarray(edit[1]).resize(size, Image.Resampling.NEAREST)).copy()
        x[x[..., 3] == 0] = (*colour, 0)
        run(tmp_path, "--image", MEADOW, "--edit", save(tmp_path / f"{i}.png", x))
    assert torch.equal(shown[0][1], shown[1][1]) and torch.equal(shown[0][2], shown[1][2]) and not shown[0][2].all()


def test_kept_is_what_is_more_than_half_opaque(tmp_path, edit, shown):
    x = edit[1].copy()
    x[..., 3] = np.where(x[..., 3] == 0, 120, 140)
    run(tmp_path, "--image", MEADOW, "--edit", save(tmp_path / "soft.png", x))
    assert torch.equal(shown[0][2][0, 0].bool(), torch.from_numpy(x[..., 3] == 140))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_an_edit_that_marks_no_holes_goes_on_with_one_warning(tmp_path, capsys, mode, shown):
    picture = Image.open(MEADOW).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    picture.save(tmp_path / "edit.png")
    assert run(tmp_path, "--image", MEADOW, "--edit", tmp_path / "edit.png", "--steps", 10).shape == (128, 128, 3)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and "no holes" in lines[0]


def test_a_collage_is_the_same_edit_written_down(tmp_path, capsys, shown):
    content = {"image": "p.png", "segments": [{"box": [20, 60, 60, 100], "edits": [{"translate": [50, 0]}]}]}
    (tmp_path / "edits.json").write_text(json.dumps(content))
    Image.open(MEADOW).convert("RGB").save(tmp_path / "p.png")
    made = read_edits(tmp_path / "edits.json")
    this, meadow = ["--collage", tmp_path / "edits.json", "--steps", 10], ["--image", MEADOW]
    run(tmp_path, *meadow, "--edit", save(tmp_path / "edit.png", made.coarse()), "--steps", 10)
    run(tmp_path, *this)
    run(tmp_path, *this, *meadow)
    assert "warning" not in capsys.readouterr().err
    # The same edits of another picture, of that size
    Image.open(MEADOW).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "p.png")
    run(tmp_path, *this, *meadow)
    run(tmp_path, *this)
    first, *same, other = shown
    for reference, coarse, mask, _ in same:
        assert torch.equal(reference, first[0]) and torch.equal(coarse, first[1]) and torch.equal(mask, first[2])
    assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])
    Image.open(MEADOW).resize((100, 100)).save(tmp_path / "small.png")
    assert "one size" in fails(capsys, "--collage", tmp_path / "edits.json", "--image", tmp_path / "small.png")


def test_the_autoencoder_is_not_stored_twice(model, tmp_path):
    model, folder = model
    assert not (folder / "vae").exists()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 22e6
    toy = sd.load(sample.TOY, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.vae.parameters(), toy.vae.parameters()))
    assert model.size == toy.size
    other = replace(toy, vae=small.randomise(sd.load(sample.TOY, torch.float32).vae))
    with pytest.raises(ValueError, match="not the model.s autoencoder"):
        mfx.save(mfx.from_stable_diffusion(other), tmp_path / "other", vae=sample.TOY / "vae")
    assert not (tmp_path / "other").exists()
