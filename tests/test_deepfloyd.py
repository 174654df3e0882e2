"""models/deepfloyd.py: what a map keeps at both sizes, seeds, sizes, and folders that do not belong."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import read_json
from common.pictures import picture_to_tensor, tensor_to_picture
from diffusion import Schedule
from editing import options
from models import deepfloyd
from tests import small_deepfloyd as small_if
from tests.runs import GRADIENT, MEADOW, fails, half_white, run
from tests.small import randn

PICTURE = randn(1, 3, 16, 32, seed=4).clamp(-1, 1)
STEPS, GUIDANCE = (5, 4), (2.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_if.write_cascade(tmp_path_factory.mktemp("if"))


@pytest.fixture(scope="module")
def model(folders):
    return deepfloyd.load(*folders)


def edit(model, mu, **options):
    """-> what each stage ends with"""
    found = []
    whole = deepfloyd.edit_stage

    def watched(*args):
        found.append(whole(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepfloyd, "edit_stage", watched)
        states = model.encode_prompt("cats", "dogs")
        deepfloyd.edit(model, states, PICTURE, mu, STEPS, GUIDANCE, **options)
    return found


def test_load(model):
    first, second = model.stages
    assert (first.size, second.size) == (8, 16) and (first.schedule.offset, second.schedule.offset) == (0, 0)
    assert (first.schedule.threshold, second.schedule.threshold) == ((0.95, 1.5), (0.95, 1.0))
    assert second.unet.config.noised and second.unet.config.layers == (1, 2)
    assert not any(p.requires_grad for p in [*first.unet.parameters(), *model.text.parameters()])
    assert first.fit(640, 480) == (8, 8) and second.fit(300, 100) == (48, 16) and second.fit(10, 40) == (16, 64)


def test_half_precision(folders):
    model = deepfloyd.load(*folders, dtype=torch.float16)
    assert model.text.shared.weight.dtype == torch.bfloat16
    assert {stage.unet.conv_in.weight.dtype for stage in model.stages} == {torch.float16}
    assert model.encode_prompt("cats").isfinite().all()


def test_white_is_the_original_at_both_sizes(model):
    mu = torch.rand(1, 1, 16, 32, generator=torch.Generator().manual_seed(5))
    mu[..., :8] = 1
    shrunk = deepfloyd.shrink(PICTURE, model.stages[0])
    assert shrunk.shape == (1, 3, 8, 16) and (shrunk.mean() - PICTURE.mean()).abs() < 0.02
    small, large = edit(model, mu)
    assert torch.equal(small[..., :4], shrunk[..., :4]) and torch.equal(large[..., :8], PICTURE[..., :8])
    assert not torch.allclose(small[..., 4:], shrunk[..., 4:], atol=0.1)
    assert large.abs().max() <= 1 and large.isfinite().all()
    small, large = edit(model, torch.ones(1, 1))
    assert torch.equal(small, shrunk) and torch.equal(large, PICTURE)


def test_seeds_are_one_batch_or_alone(model):
    mu = torch.linspace(0, 1, 32).expand(1, 1, 16, 32)
    both = edit(model, mu, seeds=(0, 7))
    for n, seed in enumerate((0, 7)):
        alone = edit(model, mu, seeds=(seed,))
        for x, y in zip(both, alone):
            torch.testing.assert_close(x[n : n + 1], y, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[1][0], both[1][1], atol=0.1)
    draws = [deepfloyd.make_draws((3, 4, 4), [0], stage)(i) for stage in (0, 1) for i in (0, 9, 10, 11)]
    assert not any(torch.equal(x, y) for n, x in enumerate(draws) for y in draws[:n])


def test_dynamic_thresholding():
    """Of each picture for itself: the values beyond its quantile fill the range, and small values stay as they are."""
    x0 = torch.stack([torch.linspace(-4, 4, 49), torch.linspace(-0.5, 0.5, 49)]).reshape(2, 1, 7, 7)
    got = Schedule("squaredcos_cap_v2", threshold=(0.5, 3.0)).limit(x0)
    torch.testing.assert_close(got[0], (x0[0] / 2).clamp(-1, 1))
    assert torch.equal(got[1], x0[1])
    got = Schedule("squaredcos_cap_v2", threshold=(0.5, 1.5)).limit(x0)
    torch.testing.assert_close(got[0], (x0[0] / 1.5).clamp(-1, 1))


def change(file, **entries):
    file.write_text(json.dumps(read_json(file) | entries))


def add_piece(file):
    file.write_bytes(file.read_bytes() + small_if.encode_field(1, small_if.encode_field(1, b"more")))


WRONG = {  # what is done to the two folders, and what is said
    "no T5": (lambda a, b: shutil.rmtree(a / "text_encoder"), "IF reads its prompts with T5. Put the folders text_enc"),
    "no tokenizer": (lambda a, b: shutil.rmtree(a / "tokenizer"), r"no tokenizer in .*/tokenizer: put spiece\.model"),
    "no second": (lambda a, b: shutil.rmtree(b), "IF-II is not a stage of DeepFloyd IF: there is no folder unet/"),
    "first twice": (lambda a, b: shutil.copytree(a, b, dirs_exist_ok=True), "IF-II is not a stage II of DeepFloyd IF"),
    "second twice": (lambda a, b: shutil.copytree(b, a, dirs_exist_ok=True), "IF-I is not a stage I of DeepFloyd IF"),
    "no configuration": (lambda a, b: (a / "unet/config.json").unlink(), "there is no file .*IF-I/unet/config.json"),
    "no scheduler": (lambda a, b: shutil.rmtree(b / "scheduler"), "there is no file .*scheduler_config.json"),
    "a scheduler": (lambda a, b: change(b / "scheduler/scheduler_config.json", sample_max_value="1"),
                    "IF-II/scheduler/scheduler_config.json: dynamic thresholding .* up to '1'"),
    "a T5": (lambda a, b: change(a / "text_encoder/config.json", d_ff=3.5), "text_encoder.*mlp_width should be a"),
    "a tokenizer": (lambda a, b: add_piece(a / "tokenizer/spiece.model"), "not the T5's, which knows .* symbols only"),
    "a UNet": (lambda a, b: change(a / "unet/config.json", resnet_out_scale_factor="1", mid_block_scale_factor="1"),
               r"unet.*\(its scale should be a number about 1"),
    "a shard": (lambda a, b: (a / "text_encoder/model-00002-of-00002.safetensors").unlink(), "there is no file .*0000"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_folders_are_one_line(folders, tmp_path, what):
    a, b = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders)
    damage, said = WRONG[what]
    damage(a, b)
    with pytest.raises((ValueError, OSError), match=said) as error:
        deepfloyd.load(a, b)
    assert "\n" not in str(error.value)


# --- sample.py with both stages under a map ---------------------------------------------------------


@pytest.fixture
def cascade(folders):
    return ["--weights", folders[0], "--super-resolution", folders[1], "--prompt", "a red circle", "--image", MEADOW]


def test_what_is_white_stays(tmp_path, cascade):
    mask = half_white(tmp_path / "map.png")
    edited = run(tmp_path, *cascade, "--change-map", mask, "--negative", "cats", steps=3)
    small = tensor_to_picture(picture_to_tensor(Image.open(MEADOW), (16, 16))[0] / 2 + 0.5)
    kept = np.asarray(small, int)
    assert edited.shape == (16, 16, 3)
    assert np.array_equal(edited[:, 8:], kept[:, 8:]) and np.abs(edited[:, :8] - kept[:, :8]).mean() > 10
    said = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert (said["sampler"], said["steps"], said["seed"]) == ("ddpm", "3 and 3", 0)


def test_samples_and_a_fan(tmp_path, cascade):
    assert run(tmp_path, *cascade, "--strength-fan", 2, "--samples", 2, "--guidance", 1, steps=2) is None
    pictures = [np.asarray(Image.open(tmp_path / f"out-{seed}.png"), int) for seed in (0, 1)]
    assert pictures[0].shape[0] > 16 and not np.array_equal(*pictures)  # under a bar with labels


def test_what_does_not_go_with_it(tmp_path, capsys, cascade):
    for option in options.REFUSED["super_resolution"][1]:
        assert option in vars(options.parse([], "")[1])
    words = [*cascade, "--change-map", GRADIENT, "--out", tmp_path / "out.png"]
    assert "--sampler does not go with --super-resolution" in fails(capsys, *words, "--sampler", "ddim")
    assert "needs --image, and DeepFloyd IF's first stage as --weights" in fails(capsys, *words[2:])
    assert "IF-I is DeepFloyd IF's: it goes with --super-resolution" in fails(capsys, *words[:2], *words[4:])
    assert "IF-II is not a stage I of DeepFloyd IF" in fails(capsys, *words, "--weights", cascade[3])
    assert not any(tmp_path.iterdir())
