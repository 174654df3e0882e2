"""data.py by the networks that the paper used: RAFT, Segment Anything, MiDaS; small and random ones."""

import functools
import json
import tarfile

import numpy as np
import pytest
import torch

import data
from checkpoints import published
from data import PairRecipe
from networks import midas, raft
from tests.networks import DPT, FILES, write_networks
from tests.runs import contents, film, last_line, picture
from video import estimators
from video.batches import ShardPairs

fails = functools.partial(last_line, program=data)
# Pixels of the pairs, and by how many the film goes left in clips.STEP, four frames of 25 a second
SIDE, PAN = 64, 2.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    write_networks(folder, -PAN * 128 / SIDE)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """RAFT at a size and a number of iterations for tests, where no other process needs to know."""
    monkeypatch.setitem(estimators.FLOW, "raft", lambda model, frames: raft.clip_flows(model, frames, (128, 128), 1))
    yield
    estimators.load_model.cache_clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return film(tmp_path_factory.mktemp("film") / "pan.mp4", pan=PAN / 4)


def test_what_estimators_give(folder, quick):
    old = PairRecipe(flow="dis", segments="classical", depth="flow")
    new = PairRecipe(flow="raft", segments="sam", depth="midas")
    assert estimators.find_weights(old, folder) == {}
    weights = estimators.find_weights(new, folder)
    assert weights == {kind: folder / name for kind, name in FILES.items()}
    first, second = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), np.uint8)
    moved = np.ones((2, 48, 80), np.float32)
    found = []
    for flows, segment, depth in (estimators.get_estimators(old), estimators.get_estimators(new, weights)):
        estimated = flows([first, second])
        assert len(estimated) == 1
        found.append((estimated[0].numpy(), segment(first), depth(first, moved)))
    for what, a, b in zip(("flow", "segments", "depth"), *found):
        assert a.shape == b.shape and (a.dtype == b.dtype or what == "depth"), what
        assert np.isfinite(b).all() and (b.min() >= 0 or what != "segments")
    near = midas.depth(published.load("midas", weights["midas"]), first).numpy()
    far = found[1][2]
    ends = far.ravel()[near.argmax()], far.ravel()[near.argmin()]
    assert near.std() > 0 and ends == pytest.approx((far.min(), far.max()), rel=1e-4)  # of two loaded networks


ALL = ("--flow", "raft", "--segments", "sam", "--depth", "midas")


def test_pairs_by_all_three_networks(folder, clip, tmp_path, quick, capsys):
    data.main([str(clip), "--out", str(tmp_path), "--size", str(SIDE), *ALL, "--networks", str(folder)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["totals"]["kept"] == 1 and str(folder) not in json.dumps(manifest)
    assert manifest["networks"] == {kind: {"file": name, "sha256": published.digest(folder / name)}
                                    for kind, name in FILES.items()}
    assert len(list(ShardPairs(tmp_path, "affine", epochs=1))) == 1
    with tarfile.open(tmp_path / "pairs-000000.tar") as tar:
        files = {name.split(".", 1)[1]: tar.extractfile(name).read() for name in tar.getnames()}
    about = json.loads(files["json"])
    assert about["estimators"] == ["raft", "sam", "midas"] and about["segments"] >= 1
    assert about["moved_95"] == pytest.approx(PAN * about["steps"], abs=0.1)  # this RAFT knows the film
    ref, gt, coarse = (picture(files, k).astype(float) for k in ("ref.jpg", "gt.jpg", "flow.png"))
    kept = coarse[..., 3] == 255
    assert np.abs(coarse[..., :3] - gt)[kept].mean() < 0.25 * np.abs(ref - gt)[kept].mean()


@pytest.mark.parametrize("option, kind, name", [
    ("--flow", "raft", "RAFT"), ("--segments", "sam", "Segment Anything"), ("--depth", "midas", "MiDaS"),
])
def test_numbers_that_are_not_finite_are_told(folder, clip, tmp_path, monkeypatch, capsys, option, kind, name):
    small = functools.partial(raft.clip_flows, size=(128, 128), iterations=1)
    monkeypatch.setattr(raft, "clip_flows", small)
    tensors = torch.load(folder / FILES[kind], weights_only=True)
    torch.save({key: x * torch.nan if x.ndim else x for key, x in tensors.items()}, tmp_path / FILES[kind])
    line = fails(capsys, clip, "--out", tmp_path / "out", "--size", SIDE, option, kind, "--networks", tmp_path)
    assert f"what {name} computes is not finite: its file is damaged" in line


def test_another_file_is_another_recipe(folder, clip, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    arguments = (clip, "--out", out, "--size", "64", "--depth", "midas", "--networks")
    data.main([str(a) for a in (*arguments, folder)])
    done = contents(out)
    other.mkdir()
    (other / "dpt_large_384.pt").write_bytes((folder / "dpt_large_384.pt").read_bytes())
    data.main([str(a) for a in (*arguments, other)])  # the same file, elsewhere
    torch.save(midas.DPT(DPT).state_dict(), other / "dpt_large_384.pt")
    assert "was begun with other networks" in fails(capsys, *arguments, other)
    assert "was begun with other recipe" in fails(capsys, clip, "--out", out, "--size", "64")
    assert contents(out) == done


def test_wrong_networks_are_named_before_anything_is_written(folder, clip, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (clip, "--out", out, *ALL, "--networks", tmp_path)
    assert "RAFT-Large needs raft_large" in fails(capsys, *arguments)
    for kind in ("raft", "sam"):
        (tmp_path / FILES[kind]).symlink_to(folder / FILES[kind])
    assert "DPT-Large needs dpt_large_384.pt" in fails(capsys, *arguments)
    (tmp_path / FILES["midas"]).symlink_to(folder / FILES["sam"])
    assert fails(capsys, *arguments).endswith("and this is Segment Anything")
    assert fails(capsys, *arguments).startswith("data.py: error: ")
    assert "--device tpu cannot be used here" in fails(capsys, *arguments[:-1], folder, "--device", "tpu")
    assert not out.exists()
