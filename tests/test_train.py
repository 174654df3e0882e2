"""The training loop: exact resume, whole checkpoints, a clear stop."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

import loop
import train
import train_toys
import vae

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


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--stage", "base"], ["--lr", "x"], ["--init", "nowhere"],
                                  ["--stage", "vae", "--preset", "a100"], ["--stage", "base", "--motion", "flow"]])
def test_mistakes_get_one_line(tmp_path, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path), *argv])  # stage base has no autoencoder to start from here
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    """A process that dies inside the write: the file under the final name is the complete old one."""
    path = tmp_path / "state"
    code = f"""
        import os, layouts
        with layouts.whole({str(path)!r}) as tmp:
            tmp.write_bytes(b"old")
        with layouts.whole({str(path)!r}) as tmp:
            tmp.write_bytes(b"ne")
            os.kill(os.getpid(), 9)
    """
    root = Path(train.__file__).parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env).returncode == -9
    assert path.read_bytes() == b"old"
