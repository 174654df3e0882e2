"""The toys beside the toy: a refiner, a cascade of pixels; every stage from end to end."""

import pytest
import torch

import samplers
import sd
from common.run_state import generator_at
from models import deepfloyd, t5, xl
from reproduce import toy_batches, train_cascade, train_toys
from tests import small
from toy import world


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny Stable Diffusion, its folder."""
    folder = tmp_path_factory.mktemp("plain")
    sd.save(small.stable_diffusion(), folder)
    return folder


def train(stage, out, monkeypatch, *more):
    """Two steps on four scenes; sheets of one step"""
    whole = samplers.make_sampler
    monkeypatch.setattr(samplers, "make_sampler", lambda name, schedule, k: whole(name, schedule, 1))
    usual = ["--steps", "2", "--batch", "2", "--scenes", "4", "--device", "cpu", "--precision", "fp32"]
    train_toys.main([stage, "--out", str(out), *usual, *map(str, more)])
    monkeypatch.setattr(samplers, "make_sampler", whole)


@pytest.mark.slow
def test_a_refiner_is_a_unet_alone(plain, tmp_path, monkeypatch):
    train("refiner", tmp_path, monkeypatch, "--init", plain)
    base = sd.load(plain)
    refiner = xl.load_unet(base, tmp_path / "model", None, "cpu")
    sd.check_fit(tmp_path, refiner)
    xl.check_refiner(base, refiner, "it")
    assert not (tmp_path / "model/vae").exists() and refiner.unet.config.channels == (48, 64)


def test_a_refiner_learns_low_noise_alone():
    recipe = train_toys.RECIPES["refiner"]
    scenes = world.random_scenes(recipe.scenes, generator_at(0, 0))
    t = torch.cat([toy_batches.draws(recipe, scenes, (4, 8, 8), step)[2] for step in range(3)])
    assert t.max() < 200 and t.max() > 180 and t.min() < 20


def test_words_of_captions_are_pieces():
    scenes = world.random_scenes(200, generator_at(0, 0))
    tokenizer = t5.Tokenizer(train_cascade.learn_words(world.captions(scenes, generator_at(0, 0))))
    told = "a red ball, a blue house and a green tree on snow at night"
    ids = tokenizer.encode(told)
    assert tokenizer.unknown not in ids and len(ids) == len(told.replace(",", " ,").split()) < len(told) / 3
    assert tokenizer.encode("a zebra") == [tokenizer.encode("a")[0], tokenizer.unknown]


@pytest.mark.slow
def test_both_stages_of_pixels(tmp_path, monkeypatch):
    for stage in ("if-1", "if-2"):
        train(stage, tmp_path, monkeypatch)
    folders = [tmp_path / "model" / name for name in ("IF-I", "IF-II")]
    model = deepfloyd.load(*folders)
    assert [stage.size for stage in model.stages] == [32, 128]
    picture, mu = small.randn(1, 3, 128, 128).clamp(-1, 1), torch.zeros(1, 1, 128, 128)
    mu[..., :64] = 1
    x = deepfloyd.edit(model, model.encode_prompt("a red ball"), picture, mu, (2, 2), (3.0, 1.0))
    assert torch.equal(x[..., :64], picture[..., :64]) and x.isfinite().all()
    train("if-1", tmp_path / "on", monkeypatch, "--init", folders[0])
    went_on = deepfloyd.load(tmp_path / "on/model/IF-I", folders[1])
    assert torch.equal(went_on.text.shared.weight, model.text.shared.weight)
    unets = [one.stages[0].unet.conv_in.weight for one in (model, went_on)]
    assert not torch.equal(*unets)
