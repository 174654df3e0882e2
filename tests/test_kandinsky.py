"""models/kandinsky.py: what holds of an edit, wrong folders, and sample.py. Its numbers are held in tests/parity."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints.names import OLD_ATTENTION
from models import kandinsky
from tests import small_kandinsky
from tests.runs import GRADIENT, MEADOW, fails, run, same_picture
from tests.small import randn


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_kandinsky.write_folders(tmp_path_factory.mktemp("kandinsky"))


@pytest.fixture(scope="module")
def model(folders):
    return kandinsky.load(*folders)


def test_an_embedding_is_of_its_prompt_and_seed(model):
    both = model.embed(["a red circle", "two blue squares"], guided=False, seeds=[3, 4])
    one = model.embed("two blue squares", guided=False, seeds=[4])
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)
    other = model.embed("two blue squares", guided=False, seeds=[5])
    assert (one - other).abs().max() > 1e-3 and (both[0] - both[1]).abs().max() > 1e-3


def test_a_variance_that_is_not_learned_is_left_out(folders, model, tmp_path):
    shutil.copytree(folders[1], tmp_path / "fixed")
    file = tmp_path / "fixed/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "fixed_small"}))
    fixed = kandinsky.load(folders[0], tmp_path / "fixed")
    z, t = randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        outputs = [m.denoiser("a red circle", "cats")(z, t) for m in (fixed, model)]
    assert outputs[0].shape[1] == 4 and outputs[1].shape[1] == 8
    torch.testing.assert_close(outputs[0], outputs[1][:, :4], rtol=1e-4, atol=1e-4)


def test_an_autoencoder_in_the_names_of_2023(folders, model, tmp_path):
    shutil.copytree(folders[1], tmp_path / "old")
    file = tmp_path / "old/movq/diffusion_pytorch_model.safetensors"
    tensors, old = load_file(file), {new: name for name, new in OLD_ATTENTION.items()}
    save_file({re.sub("to_(q|k|v|out\\.0)\\.", lambda m: old[m[0]], name): x for name, x in tensors.items()}, file)
    got = kandinsky.load(folders[0], tmp_path / "old").vae.state_dict()
    assert all(torch.equal(got[name], x) for name, x in model.vae.state_dict().items())


def test_how_a_scheduler_says_what_limits_the_picture(model):
    assert (model.schedule.clip, model.prior_schedule.clip) == (2.0, 10.0)
    said = small_kandinsky.SCHEDULERS["decoder"]
    dynamic, _ = kandinsky.read_decoder_schedule(said | {"thresholding": True, "sample_max_value": None})
    assert dynamic.threshold == (0.995, float("inf")) and dynamic.clip is None
    nothing, _ = kandinsky.read_decoder_schedule(said | {"clip_sample": False})
    assert nothing.clip is None and nothing.name == "linear_sd" and nothing.offset == 0


# --- Wrong inputs: each is one line ---------------------------------------------------------------


def say(file, **entries):
    return lambda it: (it / file).write_text(json.dumps(json.loads((it / file).read_text()) | entries))


WRONG = [
    (lambda it: shutil.rmtree(it / "prior/text_encoder"), "no folder text_encoder/"),
    (lambda it: (it / "decoder").rename(it / "other"), "decoder is not the decoder .* no folder unet/"),
    (lambda it: (it / "decoder/scheduler/scheduler_config.json").unlink(), "no file .*decoder/scheduler"),
    (say("prior/scheduler/scheduler_config.json", prediction_type="epsilon"), "prediction_type"),
    (say("prior/scheduler/scheduler_config.json", clip_sample_range="x"), "clip_sample_range"),
    (say("decoder/scheduler/scheduler_config.json", variance_type="learned"), "variance_type of 'learned'"),
    (say("decoder/scheduler/scheduler_config.json", beta_start=0.1), "beta_start"),
    (say("decoder/movq/config.json", norm_type="group"), "norm_type"),
    (say("decoder/movq/config.json", layers_per_block=10**9), "blocks"),
    (say("decoder/unet/config.json", encoder_hid_dim=48), "misshapen"),
    (say("prior/prior/config.json", num_layers=3), "missing tensors"),
    (say("prior/prior/config.json", num_attention_heads="2"), "heads"),
    (say("prior/image_encoder/config.json", patch_size=0), "patch"),
]


@pytest.mark.parametrize("change, words", WRONG)
def test_a_folder_that_is_not_whole(folders, tmp_path, change, words):
    shutil.copytree(folders[0].parent, tmp_path / "it")
    change(tmp_path / "it")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
        kandinsky.load(tmp_path / "it/prior", tmp_path / "it/decoder")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_an_added_word_that_the_text_encoder_does_not_know(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "prior")
    (tmp_path / "prior/tokenizer/added_tokens.json").write_text(json.dumps({"<cat>": 49408}))
    with pytest.warns(UserWarning, match="does not know the added words <cat>, which are spelled out"):
        model = kandinsky.load(tmp_path / "prior", folders[1])
    assert model.embed("a <cat>").shape == (2, 32)


def test_without_an_image_encoder_there_must_be_a_negative_prompt(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "prior")
    shutil.rmtree(tmp_path / "prior/image_encoder")
    model = kandinsky.load(tmp_path / "prior", folders[1])
    assert model.embed("a red circle", "cats").shape == (2, 32)
    assert model.embed("a red circle", guided=False).shape == (1, 32)
    with pytest.raises(ValueError, match="needs the folder image_encoder/ of its prior: put it there, or"):
        model.embed("a red circle")
    with pytest.raises(ValueError, match="for each picture, or for none"):
        model.embed(["a", "b"], ["cats", ""])


# --- sample.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--image", MEADOW, "--change-map", GRADIENT], []], ids=["map", "text"])
def test_command_lines(tmp_path, folders, words):
    words = ["--prior", folders[0], "--weights", folders[1], "--prompt", "a red circle", *words]
    strip = tmp_path / "strip.png"
    assert run(tmp_path, *words, "--samples", 2, "--steps-strip", strip) is None and strip.exists()
    said = json.loads(Image.open(tmp_path / "out-1.png").text["parameters"])
    assert said["sampler"] == "ddpm" and said["guidance"] == 4 and said["prior"] == str(folders[0])
    alone = run(tmp_path, *words, "--seed", 1)
    assert same_picture(alone, np.asarray(Image.open(tmp_path / "out-1.png").convert("RGB"), int))
    assert not same_picture(alone, run(tmp_path, *words, "--seed", 1, "--negative", "cats"))
    run(tmp_path, *words, "--sampler", "dpm++")


def test_command_lines_that_are_wrong(tmp_path, folders, capsys):
    words = ["--prompt", "cats", "--steps", 2, "--out", tmp_path / "out.png"]
    assert f"{folders[1]} is Kandinsky's: it goes with --prior" in fails(capsys, *words, "--weights", folders[1])
    assert "--prior needs --weights" in fails(capsys, *words, "--prior", folders[0])
    both = [*words, "--weights", folders[0], "--prior", folders[1]]
    assert f"{folders[1]} is not the prior of a Kandinsky 2.2" in fails(capsys, *both)
    assert "--a1111 does not go with --prior" in fails(capsys, *both, "--a1111")
