"""train.py from the command line: resume after kill -9, many processes, shards, the ablation."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mfx
import sd
import train
from tests import small
from tests.training import arguments, equal, fails, read_state, run_python, write_shards, write_stable
from toy import captions
from video.batches import ShardPairs, cache_latents, make_held_out

pytestmark = pytest.mark.usefixtures("short_sheets")


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return write_stable(tmp_path_factory.mktemp("stable"))


def test_without_arguments_it_trains_the_shipped_toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--steps", "1", "--batch", "2", "--held-out", "2", "--pairs", "0", "--device", "cpu"])
    run = tmp_path / "runs/mfx"
    assert cv2.imread(run / "mfx-samples.png").shape == (4 * 128, 2 * 128, 3)
    assert cv2.imread(run / "mfx-loss.png").std() > 0
    assert mfx.load(run / "model").schedule.prediction == "v_prediction"


@pytest.mark.slow
def test_two_processes_compute_what_one_does(stable, tmp_path):
    """At the same global batch, one of them with two micro-batches to each; pairs rendered as they come."""
    common = ["--steps", 4, "--save-every", 2, "--pairs", 0, "--lr", 1e-3, "--precision", "fp32"]
    train.main(arguments(stable, tmp_path / "one", *common))
    run_python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py",
               *arguments(stable, tmp_path / "two", *common, "--micro-batch", 1))
    (a, *one), (b, *two) = read_state(tmp_path / "one"), read_state(tmp_path / "two")
    assert np.allclose(one[0], two[0], rtol=1e-5, atol=0)  # the losses of every step
    assert np.allclose(one[1], two[1], rtol=1e-4, atol=0)  # of held-out pairs
    assert max((a[k] - b[k]).abs().max().item() for k in a if k.startswith("m.")) < 1e-4
    assert (tmp_path / "two/model/synthesizer/config.json").exists()


def test_shards_are_resumed_where_they_were_left(stable, tmp_path):
    folder = write_shards(tmp_path / "pairs")
    common = ["--data", folder, "--warmup", 1, "--lr", 1e-3, "--micro-batch", 2, "--pairs", 0]
    steps = replace(train.RECIPES["toy"], cosine=False)  # a rate that does not know the last step
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.RECIPES, "toy", steps)
        train.main(arguments(stable, tmp_path / "a", *common, "--steps", 4))
        train.main(arguments(stable, tmp_path / "b", *common, "--steps", 2))
        train.main(["--out", str(tmp_path / "b"), "--resume", "--steps", "4", "--device", "cpu"])
        train.main(arguments(stable, tmp_path / "c", *common, "--steps", 1, "--pairs", 8))
    (a, losses, validation), (b, others, _) = read_state(tmp_path / "a"), read_state(tmp_path / "b")
    assert losses == others and equal(a, b) and len(set(losses)) == 4
    assert [step for step, _ in validation] == [4]
    assert cv2.imread(tmp_path / "a/mfx-samples.png").shape == (4 * 16, 2 * 16, 3)
    assert load_file(tmp_path / "c/pairs.safetensors")["mask"].shape == (32, 1, 8, 8)  # kept: a short run needs no more


def test_held_out_shards_are_not_trained_on(tmp_path):
    recipe = replace(train.RECIPES["paper"], data=str(write_shards(tmp_path / "pairs")), held_out=64)
    taught, held = (ShardPairs(recipe.data, held_out=held_out) for held_out in (False, True))
    assert {p for p, _ in taught.shards}.isdisjoint(p for p, _ in held.shards)
    assert (taught.pairs, held.pairs, len(make_held_out(recipe, 16)["mask"])) == (8, 4, 4)


def test_the_toys_exact_pairs_are_mixed_in(tmp_path):
    device = torch.device("cpu")
    model = mfx.from_stable_diffusion(replace(small.stable_diffusion(), size=16))
    recipe = replace(train.RECIPES["toy"], pairs=64, held_out=0)
    toys = cache_latents(recipe, tmp_path / "toys.safetensors", model, device)
    recipe = replace(recipe, data=str(write_shards(tmp_path / "pairs")), exact=0.5)
    both = cache_latents(recipe, tmp_path / "both.safetensors", model, device)
    none = cache_latents(replace(recipe, exact=0.0), tmp_path / "none.safetensors", model, device)
    more = cache_latents(replace(recipe, pairs=256), tmp_path / "more.safetensors", model, device)
    assert len(more["mask"]) == 64  # of few pairs from shards there is still a half
    users = cache_latents(replace(recipe, edits=1.0), tmp_path / "users.safetensors", model, device)
    for name in toys:
        assert torch.equal(users[name][32:], both[name][32:]) and not torch.equal(users[name], both[name])
        assert len(both[name]) == 64 and len(none[name]) == 32  # eight pairs by two motion models are not 64
        assert torch.equal(both[name][:32], toys[name][:32])
        assert torch.equal(both[name][32:], none[name][:32])
    assert not torch.equal(toys["target"], none["target"])


def test_a_model_is_for_the_size_of_its_pairs(tmp_path):
    larger = write_stable(tmp_path / "larger")
    config = larger / "unet/config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": 16'))
    assert sd.load(larger).size == 32
    pairs = write_shards(tmp_path / "pairs")  # of 16 pixels
    train.main(arguments(larger, tmp_path / "out", "--data", pairs, "--steps", 1, "--pairs", 0))
    assert mfx.load(tmp_path / "out/model").size == 16


def test_a_start_without_signal_at_the_end_can_draw_its_samples(tmp_path):
    stable = write_stable(tmp_path / "stable")
    config = stable / "scheduler/scheduler_config.json"
    said = json.loads(config.read_text()) | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    config.write_text(json.dumps(said))
    train.main(arguments(stable, tmp_path / "out", "--steps", 1, "--prediction", "v_prediction"))
    assert (tmp_path / "out/mfx-samples.png").exists()
    assert mfx.load(tmp_path / "out/model").schedule.name == "zero_snr"


def test_shares_of_pairs_that_there_will_not_be(stable, tmp_path, capsys):
    pairs = ["--data", write_shards(tmp_path / "pairs")]
    for words, says in (([*pairs, "--pairs", 0, "--exact", 0.5], "how many, --pairs"),
                        ([*pairs, "--edits", 0.5], "how many, --exact")):
        line = fails(train.main, arguments(stable, tmp_path / "out", "--steps", 2, *words), capsys)
        assert says in line and not list(tmp_path.glob("out/*.safetensors"))


def test_without_cross_reference_there_is_no_extractor(stable, tmp_path):
    train.main(arguments(stable, tmp_path, "--steps", 1, "--no-cross-reference", "--motion", "flow", "--held-out", 0))
    model = mfx.load(tmp_path / "model")
    assert model.extractor is None and model.image_encoder.config.projection == sum(captions.SIZES)
    assert not (tmp_path / "mfx-samples.png").exists() and (tmp_path / "mfx-loss.png").exists()


def test_a_magic_fixup_is_trained_further(stable, tmp_path, capsys):
    """By the recipe of its width, from its very weights; with --as-paper by the paper's text from then on."""
    train.main(arguments(stable, tmp_path / "a", "--steps", 2, "--held-out", 0))
    more = ["--steps", 1, "--lr", 1e-9, "--as-paper", "--held-out", 0]
    train.main(arguments(tmp_path / "a/model", tmp_path / "b", *more))
    a, b = (mfx.load(tmp_path / name / "model") for name in "ab")
    assert equal(a.state_dict(), b.state_dict()) and (a.as_paper, b.as_paper) == (False, True)
    assert a.schedule.name != "linear" and b.schedule.name == "linear" and b.drop == 0 < a.drop
    recipe = replace(train.RECIPES["toy"], init=str(tmp_path / "a/model"), as_paper=True)
    assert train.start_model(recipe).drop == 0  # not only once it is saved
    line = fails(train.main, arguments(tmp_path / "a/model", tmp_path / "c", "--no-cross-reference"), capsys)
    assert "has a detail extractor: leave out --no-cross-reference" in line and not (tmp_path / "c").exists()
