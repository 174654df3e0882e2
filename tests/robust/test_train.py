"""Training that cannot start, cannot go on, or is killed: one line, and whole files."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mfx
import train
import vae
from common.run_state import cache_tensors, list_states, read_recipe
from tests.training import arguments, fails, random_fixup, write_shards, write_stable

RECIPE = train.Recipe(steps=10, batch=2, lr=5e-3, warmup=3, ema=0.9, save_every=2)


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return write_stable(tmp_path_factory.mktemp("stable"))


def fit(out, resume=False, recipe=RECIPE, width=8):
    torch.manual_seed(int(resume))
    model = vae.VAE(vae.VAEConfig(channels=(width, width), layers=1, latent_channels=2, groups=4))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss(step, part):
        return (model.decode(model.encode(x)[0]) - x).square().mean()

    train.fit("tiny", model, loss, None, recipe, out, resume)
    return model


def test_the_last_states_are_kept_and_the_newest_whole_one_is_resumed(tmp_path, capsys):
    fit(tmp_path)
    kept = list_states(tmp_path, "tiny")
    assert [p.name[11:18] for p in kept] == ["0000006", "0000008", "0000010"]
    whole = load_file(kept[-1])
    kept[-1].write_bytes(kept[-1].read_bytes()[:-1])  # a byte short
    resumed = fit(tmp_path, resume=True)
    assert "0000010.safetensors is damaged" in capsys.readouterr().err
    assert all(torch.equal(whole[f"model.{name}"], p) for name, p in resumed.named_parameters())
    assert [p.name[11:18] for p in list_states(tmp_path, "tiny")] == ["0000006", "0000008", "0000010"]


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        read_recipe(tmp_path, "tiny", train.Recipe)
    (tmp_path / "tiny-state-0000004.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="damaged"):
        read_recipe(tmp_path, "tiny", train.Recipe)
    fit(tmp_path, recipe=replace(RECIPE, steps=6))
    assert read_recipe(tmp_path, "tiny", train.Recipe) == replace(RECIPE, steps=6)
    with pytest.raises(ValueError, match="another model"):
        fit(tmp_path, resume=True, width=16)


def test_what_is_cached_is_made_again_of_other_things(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.full((2,), float(len(made)))}

    for made_from, number in (("a", 1), ("a", 1), ("b", 2)):
        assert cache_tensors(tmp_path / "x.safetensors", made_from, make)["x"].tolist() == [number] * 2
    (tmp_path / "x.safetensors").write_bytes(b"damaged")
    assert cache_tensors(tmp_path / "x.safetensors", "b", make)["x"].tolist() == [3, 3]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
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
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)}
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env).returncode == -9
    assert path.read_bytes() == b"old"


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(stable, tmp_path, capsys, monkeypatch):
    loss = mfx.MagicFixup.loss
    monkeypatch.setattr(mfx.MagicFixup, "loss", lambda self, *batch: loss(self, *batch) * float("nan"))
    for clip in (1.0, None):
        monkeypatch.setitem(train.RECIPES, "toy", replace(train.RECIPES["toy"], clip=clip))
        line = fails(train.main, arguments(stable, tmp_path, "--steps", 2, "--held-out", 0), capsys)
        assert "not finite at step 0: resume with a lower --lr" in line
    assert not list_states(tmp_path, "mfx")


@pytest.mark.parametrize(("argv", "what"), [
    (["--steps", "0"], "--steps"), (["--lr", "x"], "--lr"), (["--init", "nowhere"], "nowhere"),
])
def test_options_out_of_range(tmp_path, argv, what, capsys):
    assert what in fails(train.main, ["--out", tmp_path, *argv], capsys)


def test_mistakes_get_one_line(stable, tmp_path, capsys):
    mfx.save(random_fixup(stable), tmp_path / "magic")
    (tmp_path / "empty").mkdir()
    write_shards(tmp_path / "single", shards=1)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/mfx-state-0000500.safetensors").write_bytes(b"precious")
    out = tmp_path / "out"
    for argv, what in (
        (arguments(stable, out, "--data", tmp_path / "nowhere"), "no finished shards"),
        (arguments(stable, out, "--data", tmp_path / "empty"), "no finished shards"),
        (arguments(stable, out, "--data", tmp_path / "single"), "--held-out 0"),
        (arguments(stable, out, "--micro-batch", 3), "micro-batches of 3"),
        (arguments(tmp_path / "nowhere", out), "no checkpoint"),
        (arguments(tmp_path / "magic", out), "not a Stable Diffusion"),
        (arguments(stable, out, "--resume"), "nothing to resume"),
        (arguments(stable, tmp_path / "begun"), "--resume goes on with it, another --out starts anew"),
    ):
        assert what in fails(train.main, argv, capsys)
    assert (tmp_path / "begun/mfx-state-0000500.safetensors").read_bytes() == b"precious"
