"""The training loop: exact resume, whole checkpoints, a clear stop."""

import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

import loop
import train
import vae
from reproduce import train_toys

RECIPE = train.Recipe(steps=12, batch=2, lr=5e-3, warmup=3, ema=0.9, save_every=4)


def tiny(seed=0):
    torch.manual_seed(seed)
    return vae.VAE(vae.VAEConfig(channels=(8, 8), layers=1, latent_channels=2, groups=4))


def loss_of(model):
    def loss(step, part):
        g = train.at(0, step)
        x = (torch.rand(2, 3, 1, 1, generator=g) * 2 - 1).expand(2, 3, 8, 8)
        return train_toys.vae_loss(model, x, torch.ones(2, 1, 8, 8), torch.randn(2, 2, 4, 4, generator=g))

    return loss


def run(model, out, resume, loss=None, recipe=RECIPE):
    sheet = torch.zeros(1, 8, 3, 8, 8)
    return loop.fit("tiny", model, loss or loss_of(model), lambda average: sheet, recipe, out, resume)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    a, b, c = tiny(), tiny(), tiny(seed=1)  # c's own start is forgotten: it resumes from b's state
    average = run(a, tmp_path, resume=False)
    (tmp_path / "b").mkdir()
    broken = loss_of(b)

    def stops(step, part):
        if step == 6:  # after the save at step 4
            raise KeyboardInterrupt
        return broken(step, part)

    with pytest.raises(KeyboardInterrupt):
        run(b, tmp_path / "b", resume=False, loss=stops)
    resumed = run(c, tmp_path / "b", resume=True)
    for p, q in zip([*a.parameters(), *average.parameters()], [*c.parameters(), *resumed.parameters()]):
        assert torch.equal(p, q)
    whole, pieces = (load_file(d / "tiny-state-0000012.safetensors") for d in (tmp_path, tmp_path / "b"))
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_training_learns_and_draws(tmp_path):
    model = tiny()
    before = torch.stack([loss_of(model)(s, None) for s in range(100, 110)]).mean().item()
    average = run(model, tmp_path, resume=False)
    after = torch.stack([loss_of(average)(s, None) for s in range(100, 110)]).mean().item()
    assert after < before
    assert cv2.imread(tmp_path / "tiny-samples.png").shape == (8, 64, 3)
    assert cv2.imread(tmp_path / "tiny-loss.png").std() > 0
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path):
    model = tiny()
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        run(model, tmp_path, resume=False, loss=lambda *a: loss_of(model)(*a) * torch.nan)
    assert not loop.states(tmp_path, "tiny")


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        train.saved_recipe(tmp_path, "tiny")
    (tmp_path / "tiny-state-0000004.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="damaged"):
        train.saved_recipe(tmp_path, "tiny")
    run(tiny(), tmp_path, resume=False)
    assert train.saved_recipe(tmp_path, "tiny") == RECIPE
    with pytest.raises(ValueError, match="another model"):
        run(vae.VAE(vae.VAEConfig((16, 16), 1, 2, 4)), tmp_path, resume=True)


def test_the_last_states_are_kept_and_the_newest_whole_one_is_resumed(tmp_path, capsys):
    recipe = replace(RECIPE, steps=10, save_every=2)
    run(tiny(), tmp_path, resume=False, recipe=recipe)
    kept = loop.states(tmp_path, "tiny")
    assert [p.name[11:18] for p in kept] == ["0000006", "0000008", "0000010"]
    whole = load_file(kept[-1])
    kept[-1].write_bytes(kept[-1].read_bytes()[:-1])  # a byte short
    resumed = tiny(seed=1)
    run(resumed, tmp_path, resume=True, recipe=recipe)
    assert "0000010.safetensors is damaged" in capsys.readouterr().err
    assert all(torch.equal(whole[f"model.{name}"], p) for name, p in resumed.named_parameters())
    short = {k: v for k, v in asdict(recipe).items() if k in ("steps", "batch", "lr", "warmup", "ema", "save_every")}
    once = {"losses": json.dumps([1.0] * 10), "recipe": json.dumps(short)}  # a state as it was called and made at first
    save_file(whole, tmp_path / "tiny-state.safetensors", once)
    for old in kept:
        old.unlink()
    assert train.saved_recipe(tmp_path, "tiny") == recipe
    run(tiny(seed=1), tmp_path, resume=True, recipe=replace(recipe, steps=12))
    assert len(loop.newest(tmp_path, "tiny")[1]["losses"]) == 12
    run(tiny(), tmp_path, resume=False, recipe=replace(recipe, steps=2))  # another run takes the folder over
    assert [p.name[11:18] for p in loop.states(tmp_path, "tiny")] == ["0000002"]


@pytest.mark.parametrize(("argv", "told"), [
    (["--steps", "0"], "--steps"), (["--lr", "x"], "--lr"), (["--init", "nowhere"], "nowhere"),
    (["--stage", "base"], "first python train.py --stage vae"),  # it has no autoencoder to start from here
    (["--stage", "vae", "--preset", "a100"], "is for stage mfx"),
    (["--stage", "base", "--motion", "flow"], "--motion is for stage mfx"),
    (["--preset", "a100"], "--init sd-v1-4.ckpt"),
    (["--stage", "vae", "--scenes", "5"], "--scenes is for stage base and inpainting and mfx, not vae"),
    (["--stage", "mfx", "--offset", "0.1"], "--offset is for stage base and inpainting, not mfx"),
])
def test_mistakes_get_one_line(tmp_path, argv, told, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path), *argv])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and told in line


@pytest.mark.parametrize("batch", [1, 5])
def test_the_last_steps_of_stage_vae_have_whole_pictures(batch):
    recipe = replace(train.RECIPES["toy"]["vae"], batch=batch)
    for step, side in ((0, train_toys.CROP), (recipe.steps - 1, 128)):
        x, weight = train_toys.vae_batch(recipe, step)
        assert x.shape == (batch if step == 0 else 1, 3, side, side) and weight.shape == (len(x), 1, side, side)


def test_what_is_made_once_is_made_again_of_other_things(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.full((2,), float(len(made)))}

    for made_from, number in (("a", 1), ("a", 1), ("b", 2)):
        assert loop.made_once(tmp_path / "x.safetensors", made_from, make)["x"].tolist() == [number] * 2
    (tmp_path / "x.safetensors").write_bytes(b"damaged")
    assert loop.made_once(tmp_path / "x.safetensors", "b", make)["x"].tolist() == [3, 3]


def test_one_timestep_from_each_part():
    t = loop.stratified(8, torch.Generator().manual_seed(0))
    assert (t // 125).tolist() == list(range(8)) and t.dtype == torch.long


def test_the_rate_and_the_average(tmp_path):
    """Warm-up and half a cosine; and an average that forgets its first steps sooner than its last."""
    model, start, rates = tiny(), tiny(), []
    real = torch.optim.AdamW.step

    def step(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args)

    with mock.patch.object(torch.optim.AdamW, "step", step):
        run(model, tmp_path, resume=False)
    want = [RECIPE.lr * min(1, (i + 1) / 3) * (0.5 + 0.5 * math.cos(math.pi * i / 12)) for i in range(12)]
    assert rates == pytest.approx(want)
    once = tiny()
    (tmp_path / "once").mkdir()
    average = run(once, tmp_path / "once", resume=False, recipe=replace(RECIPE, steps=1))
    for first, last, mean in zip(start.parameters(), once.parameters(), average.parameters()):
        torch.testing.assert_close(mean, torch.lerp(first, last, 1 - 1 / 10))


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    """A process that dies inside the write: the file under the final name is the complete old one."""
    path = tmp_path / "state"
    code = f"""
        import os
        from common.files import atomic_write
        with atomic_write({str(path)!r}) as tmp:
            tmp.write_bytes(b"old")
        with atomic_write({str(path)!r}) as tmp:
            tmp.write_bytes(b"ne")
            os.kill(os.getpid(), 9)
    """
    root = Path(train.__file__).parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env).returncode == -9
    assert path.read_bytes() == b"old"


def test_the_weights_size_chooses_the_recipe(tmp_path, monkeypatch):
    def preset(width, *argv):
        wide = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(channels=(width, 1280))))
        monkeypatch.setattr(train.sd, "load", lambda path: wide)
        return train.choose_preset(SimpleNamespace(stage="mfx", init="some.ckpt"))

    assert preset(320) == "a100" and preset(64) == "toy"
    assert train.choose_preset(SimpleNamespace(stage="mfx", init=None)) == "toy"


def test_the_micro_batch_fits_into_the_memory(monkeypatch):
    paper = train.RECIPES["a100"]["mfx"]
    assert train.fitting_micro_batch(paper, torch.device("cpu")) == 1
    for GiB, most in ((24, 1), (40, 8), (80, 32)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=GiB * 2**30: (free, free))
        assert train.fitting_micro_batch(paper, torch.device("cuda")) == most
