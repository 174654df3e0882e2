"""Training that cannot start, cannot go on, or is killed: one line, and whole files."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import mfx
import train
from common import files, run_state
from common.files import HOST, atomic_write
from common.run_state import cache_batches, list_states, open_run, read_newest_state, read_recipe
from tests.training import arguments, fails, fit_tiny, random_fixup, write_shards, write_stable

pytestmark = pytest.mark.usefixtures("short_sheets")
RECIPE = train.Recipe(steps=10, batch=2, lr=5e-3, warmup=3, ema=0.9, save_every=2)


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return write_stable(tmp_path_factory.mktemp("stable"))


fit = functools.partial(fit_tiny, recipe=RECIPE)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    fit(folder)
    return folder


@pytest.fixture
def newest(fitted, tmp_path):
    """-> the last state, of step 10, of a run in tmp_path"""
    shutil.copytree(fitted, tmp_path, dirs_exist_ok=True)
    return list_states(tmp_path, "tiny")[-1]


def test_the_last_states_are_kept_and_the_newest_whole_one_is_resumed(newest, tmp_path, capsys):
    """Then the run ends where it would have without a break, bit for bit."""
    assert [p.name[11:18] for p in list_states(tmp_path, "tiny")] == ["0000006", "0000008", "0000010"]
    whole = load_file(newest)
    newest.write_bytes(newest.read_bytes()[:-1])  # a byte short
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

    def encode(batch):
        made.append(batch)
        return {"x": torch.tensor([float(len(made))])}

    for made_from, found in (("a", [1, 2]), ("a", [1, 2]), ("b", [3, 4])):
        assert cache_batches(tmp_path / "x.safetensors", made_from, "AB", encode)["x"].tolist() == found
    (tmp_path / "x.safetensors").write_bytes(b"damaged")
    assert cache_batches(tmp_path / "x.safetensors", "b", "AB", encode)["x"].tolist() == [5, 6]
    assert made == list("ABABAB")


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(stable, tmp_path, capsys, monkeypatch):
    loss = mfx.MagicFixup.loss
    monkeypatch.setattr(mfx.MagicFixup, "loss", lambda self, *batch: loss(self, *batch) * float("nan"))
    for clip in (1.0, None):
        monkeypatch.setitem(train.RECIPES, "toy", replace(train.RECIPES["toy"], clip=clip))
        line = fails(train.main, arguments(stable, tmp_path, "--steps", 2, "--held-out", 0), capsys)
        assert "not finite at step 0: resume with a lower --lr" in line
    assert not list_states(tmp_path, "mfx")


def test_what_resuming_may_change_and_what_not(stable, tmp_path, capsys, monkeypatch):
    """Also of what was left out: the usual weights, and what they predict, as the paper's recipe leaves it to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TOY", stable)
    monkeypatch.setitem(train.RECIPES, "toy", replace(train.RECIPES["toy"], prediction=None))
    pairs, out = write_shards(tmp_path / "pairs"), tmp_path / "out"
    other = write_stable(tmp_path / "other")
    _, _, *begun = arguments(stable, out, "--steps", 1, "--data", "pairs", "--motion", "flow")
    train.main(begun)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    known = {"--init": stable, "--prediction": "epsilon"}
    for words, what in (
        (["--prediction", "v_prediction"], "--prediction v_pred"), (["--no-cross-reference"], "--no-cross-reference"),
        (["--init", other], f"--init {other}"), (["--data", "toy"], "--data toy"), (["--data", other], "--data"),
        (["--motion", "affine"], "--motion affine"), (["--seed", 5], "--seed 5"), (["--batch", 2], "--batch 2"),
        (["--pairs", 0], "--pairs 0"), (["--held-out", 0], "--held-out 0"), (["--exact", 0.5], "--exact 0.5"),
    ):
        line = fails(train.main, ["--out", out, "--resume", *words], capsys)
        assert f"--resume cannot change {what}" in line and "start anew with another --out" in line
        assert f"was begun with {words[0]} {known.get(words[0], '')}" in line or words[0] not in known
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    # The same said again, otherwise spelled, or moved, and what changes no meaning
    same = ["--init", str(stable), "--prediction", "epsilon", "--data", str(pairs)]
    train.main([*begun, "--resume", "--cross-reference", *same])
    pairs.rename(tmp_path / "moved")
    train.main(["--out", str(out), "--resume", "--data", "moved", "--steps", "2", "--lr", "1e-4", "--warmup", "2",
                "--save-every", "1", "--held-out", "1", "--micro-batch", "2", "--checkpointing", "--device", "cpu"])
    assert read_recipe(out, "mfx", train.FixupRecipe).data == "moved"

    # As many pairs as before, or every batch would be another one
    for path in (tmp_path / "moved").glob("pairs-000000*"):
        shutil.copy(path, path.with_name(path.name.replace("000000", "000003")))
    line = fails(train.main, ["--out", out, "--resume", "--steps", "3"], capsys)
    assert "moved has 3 shards of 12 pairs to train on, and had 2 shards of 8 pairs when this run began" in line


def write_notes(path, **changed):
    """The state again with other notes."""
    with safe_open(path, "pt") as file:
        notes = file.metadata() | {name: json.dumps(note) for name, note in changed.items()}
    save_file(load_file(path), path, notes)


@pytest.mark.parametrize("changed", [
    dict(losses=7), dict(losses=[None] * 10), dict(losses=[0.1] * 9), dict(losses=["x"] * 10), dict(losses={"a": 1}),
    dict(losses=[[1, 2]] * 10), dict(validation=3), dict(validation={"a": 1}), dict(validation=[[1]]),
    dict(validation=[["1", 0.5]]), dict(validation=[[99, 0.5]]), dict(validation=[1, 2]),
])  # fmt: skip
def test_a_state_with_senseless_curves_is_passed_over(changed, newest, tmp_path, capsys):
    write_notes(newest, **changed)
    path, notes = read_newest_state(tmp_path, "tiny")
    assert path.name.endswith("8.safetensors") and len(notes["losses"]) == 8
    assert "0000010.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("steps", "9"), ("steps", 2.5), ("steps", True), ("batch", [4]), ("batch", 10**30), ("warmup", 0),
    ("save_every", ".."), ("save_every", 0), ("lr", None), ("lr", float("nan")), ("ema", "0.9"), ("ema", -1),
    ("micro_batch", [1e9]), ("clip", {"a": 1}), ("seed", {"a": {}}), ("init", 3), ("precision", "fp64"),
    ("checkpointing", 1), ("muon", None),
])  # fmt: skip
def test_a_state_with_a_senseless_recipe_is_told(name, value, newest, tmp_path):
    write_notes(newest, recipe=asdict(RECIPE) | {name: value})
    with pytest.raises(ValueError, match=f"is damaged: its recipe has {name} = "):
        read_recipe(tmp_path, "tiny", train.Recipe)


def test_a_state_of_another_version_is_told(newest, tmp_path):
    for recipe in ([], None, "x", {"steps": 1}, asdict(RECIPE) | {"more": 1}):
        write_notes(newest, recipe=recipe)
        with pytest.raises(ValueError, match="another version"):
            read_recipe(tmp_path, "tiny", train.Recipe)


def test_a_state_with_other_tensors_is_told(newest, tmp_path):
    """Those that PyTorch would widen or convert without a word, too."""
    with safe_open(newest, "pt") as file:
        notes = file.metadata()
    tensors = load_file(newest)
    for prefix in ("model", "average", "m", "v"):
        name = f"{prefix}.encoder.conv_in.bias"
        for other in (tensors[name][:1], tensors[name].int(), tensors[name].half(), None):
            changed = {key: t for key, t in (tensors | {name: other}).items() if t is not None}
            save_file(changed, newest, notes)
            with pytest.raises(ValueError, match="is the state of another model"):
                fit(tmp_path, resume=True)


def test_deeply_nested_notes_are_told(tmp_path):
    fit(tmp_path, recipe=replace(RECIPE, steps=2))
    path = list_states(tmp_path, "tiny")[-1]
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    save_file(load_file(path), path, notes | {"recipe": "[" * 100_000 + "]" * 100_000})
    with pytest.raises(ValueError, match="damaged"):
        read_newest_state(tmp_path, "tiny")


def test_what_dead_processes_left_is_deleted_and_what_living_ones_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    names = ["a[1].png", "mfx-state-0000500.safetensors", "a[1].png.more"]
    for name in names:
        for process in (dead.pid, living):
            (tmp_path / f".{name}.{HOST}.{process}").touch()
    (tmp_path / f".a[1].png.{dead.pid}").touch()  # an earlier version's
    foreign = [f".a[1].png.00000000.{dead.pid}", f".a[1].png.{HOST}.txt", ".a[1].png.swp", f".mfx.{HOST}.{dead.pid}"]
    for name in foreign:  # of another machine, and of other programs
        (tmp_path / name).touch()
    with atomic_write(tmp_path / "a[1].png") as temporary:
        temporary.touch()
        assert not (tmp_path / f".a[1].png.{HOST}.{dead.pid}").exists()
    with open_run(tmp_path, "mfx", False, tmp_path / "model"):
        pass
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"a[1].png", *foreign, *[f".{name}.{HOST}.{living}" for name in names],
                    f".a[1].png.more.{HOST}.{dead.pid}"}


@pytest.mark.parametrize(("argv", "what"), [
    (["--out", ""], "--out: the name is empty"), (["--init", ""], "--init: the name is empty"),
    (["--data", ""], "--data: the name is empty"),
    (["--steps", "0"], "--steps"), (["--lr", "x"], "--lr"), (["--init", "nowhere"], "nowhere"),
])
def test_options_out_of_range(tmp_path, argv, what, capsys):
    assert what in fails(train.main, ["--out", tmp_path, *argv], capsys)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, error):
    (tmp_path / "a.bin").write_text("old")
    with pytest.raises(OSError) as told:
        with atomic_write(tmp_path / "b.bin"), atomic_write(tmp_path / "a.bin") as temporary:
            temporary.write_text("half")
            raise error
    assert str(told.value) == f"{tmp_path / 'a.bin'} cannot be written: {error.args[-1]}"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_disk_without_room_for_the_states_is_told_at_the_start(stable, tmp_path, capsys, monkeypatch):
    argv = [*map(str, arguments(stable, tmp_path / "out")), "--steps", "2", "--save-every", "1"]
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(run_state.shutil, "disk_usage", usage)
    free = 0
    line = fails(train.main, argv, capsys)
    assert f"{tmp_path / 'out'} has 0.0 GiB left, and this training's states need" in line
    assert asked == [tmp_path / "out"] and not list_states(tmp_path / "out", "mfx")
    parameters = sum(p.numel() for p in random_fixup(stable).unfreeze())
    free = 2 * 4 * 4 * parameters  # two states of the weights, their average, two moments
    train.main(argv)
    assert sum(path.stat().st_size for path in list_states(tmp_path / "out", "mfx")) <= free + 20_000
    free = 0
    train.main([*argv, "--resume"])  # nothing is left to save
    assert f"{tmp_path / 'out'} has" in fails(train.main, [*argv, "--resume", "--steps", "3"], capsys)


def test_two_trainings_do_not_write_to_one_folder(stable, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    argv = arguments(stable, tmp_path / "out")
    with open_run(tmp_path / "out", "mfx", False, tmp_path / "model"):
        assert "another program is writing to" in fails(train.main, argv, capsys)
        assert not list((tmp_path / "out").iterdir())
    train.main([*map(str, argv), "--steps", "1"])
    assert list_states(tmp_path / "out", "mfx")

    # One that waits while the other ends
    def leave_state(held):
        (tmp_path / "other" / "mfx-state-0000001.safetensors").touch()
        return True

    monkeypatch.setattr(files, "try_lock", leave_state)
    argv = arguments(stable, tmp_path / "other")
    assert "holds the states of a run" in fails(train.main, argv, capsys)


def test_mistakes_get_one_line(stable, tmp_path, capsys):
    mfx.save(random_fixup(stable), tmp_path / "magic")
    (tmp_path / "empty").mkdir()
    write_shards(tmp_path / "single", shards=1)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/mfx-state-0000500.safetensors").write_bytes(b"precious")
    out = tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "done/model").mkdir(parents=True)
    for argv, what in (
        (arguments(stable, tmp_path / "file"), "file cannot be written: is"),
        (arguments(stable, tmp_path / "file/more"), "more cannot be written: is"),
        (arguments(stable, tmp_path / "file", "--resume"), "file cannot be written: is"),
        (arguments(stable, tmp_path / "done"), "model is there already, and would be written over"),
        (arguments(stable, out, "--batch", 3, "--micro-batch", 2), "micro-batches of 2"),
        (arguments(stable, out, "--data", tmp_path / "nowhere"), "no finished shards"),
        (arguments(stable, out, "--data", tmp_path / "empty"), "no finished shards"),
        (arguments(stable, out, "--data", tmp_path / "single"), "--held-out 0"),
        (arguments(stable, out, "--micro-batch", 3), "micro-batches of 3"),
        (arguments(tmp_path / "nowhere", out), "no checkpoint"),
        (arguments(tmp_path / "magic", out, "--no-cross-reference"), "leave out --no-cross-reference"),
        (arguments(stable, out, "--resume"), "nothing to resume"),
        (arguments(stable, tmp_path / "begun"), "--resume goes on with it, another --out starts anew"),
    ):
        assert what in fails(train.main, argv, capsys)
    assert (tmp_path / "begun/mfx-state-0000500.safetensors").read_bytes() == b"precious"
    assert (tmp_path / "file").read_text() == "mine" and not out.exists()  # a start that failed leaves nothing
