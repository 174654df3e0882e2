"""Magic Fixups on disk: whole, of the release, damaged, and not one at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffusion
import mfx
import sd
import unet
from checkpoints.parts import save_part
from tests import small
from tests.released import write_released
from tests.small import edit, magic_fixup, relative_error, same_weights, without_text


@pytest.fixture(scope="module")
def model():
    return magic_fixup()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


def test_save_and_load(tmp_path, model):
    mfx.save(model, tmp_path / "saved")
    again = mfx.load(tmp_path / "saved")
    assert (again.size, again.schedule.name) == (16, "scaled_linear")
    assert again.synthesizer.config == model.synthesizer.config and again.extractor.config == model.extractor.config
    assert same_weights(again, model)  # bit for bit; what is computed of weights at other addresses is not
    assert relative_error(again.sample(*edit(), steps=3), model.sample(*edit(), steps=3)) <= 1e-5
    picture = torch.rand(1, 3, 16, 16)
    there, here = (m.decode(m.encode_image(picture)) for m in (again, model))
    assert relative_error(there, here) <= 1e-5
    model.size, before = 32, model.size
    mfx.save(model, tmp_path / "saved")
    model.size = before
    assert mfx.load(tmp_path / "saved").size == 32


def test_a_released_file_saved_anew(tmp_path, released):
    ours = mfx.load(released[1])
    mfx.save(ours, tmp_path / "saved")
    again = mfx.load(tmp_path / "saved")
    assert again.schedule.name == "zero_snr"
    assert same_weights(again, ours)
    assert relative_error(again.sample(*edit(4), steps=3), ours.sample(*edit(4), steps=3)) <= 1e-5


def test_the_schedule_is_the_file_s_own(tmp_path, released):
    tensors = torch.load(released[1], weights_only=True)
    for name in ("scaled_linear", "zero_snr"):
        torch.save(tensors | {"alphas_cumprod": diffusion.Schedule(name).alphas_cumprod.half()}, tmp_path / "own.pt")
        assert mfx.load(tmp_path / "own.pt").schedule.name == name
    torch.save(tensors | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, tmp_path / "own.pt")
    assert_refused(tmp_path / "own.pt", "noise schedule")


def assert_refused(path, *words, error=ValueError):
    with pytest.raises(error) as caught:
        mfx.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_no_magic_fixup(tmp_path, released):
    assert_refused(tmp_path / "nowhere", "no checkpoint", error=FileNotFoundError)
    sd.save(small.stable_diffusion(), tmp_path / "sd")
    assert_refused(tmp_path / "sd", "not a Magic Fixup", "synthesizer/", error=FileNotFoundError)
    torch.save(small.to_original(small.stable_diffusion()), tmp_path / "sd.ckpt")
    assert_refused(tmp_path / "sd.ckpt", "not a whole Magic Fixup", "model.reference_model.")
    (tmp_path / "text.pt").write_text("weights")
    assert_refused(tmp_path / "text.pt", "damaged")

    def write(name, change):
        tensors = torch.load(released[1], weights_only=True)
        change(tensors)
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    query = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn3.to_q.weight"
    assert_refused(write("a.pt", lambda s: s.pop(query)), "missing", "attn2.to_q.weight")
    assert_refused(write("b.pt", lambda s: s.update({"model.reference_model.x": s.pop("betas")})), "unexpected", "x")
    with pytest.warns(UserWarning, match="1 tensors are of no part of the model and left out, e.g. ghost"):
        mfx.load(write("c.pt", lambda s: s.update({"ghost": torch.zeros(1)})))
    assert_refused(write("d.pt", lambda s: s.update({query: torch.zeros(3, 3)})), "misshapen")
    no_vae = write("e.pt", lambda s: [s.pop(k) for k in list(s) if k.startswith("first_stage")])
    assert_refused(no_vae, "first_stage_model.")


def test_folders_that_do_not_fit_together(tmp_path, model):
    folder = tmp_path / "mixed"
    mfx.save(model, folder)
    save_part(unet.UNet(replace(model.extractor.config, heads=8)), folder / "extractor")
    assert_refused(folder, "extractor")
    save_part(without_text().unet, folder / "synthesizer")
    assert_refused(folder, "25 channels in")
    Path(folder / "scheduler" / "scheduler_config.json").unlink()
    assert_refused(folder, "scheduler_config.json", error=FileNotFoundError)
