"""data.py as a program: shards by many workers and machines, killed and resumed, and its errors."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import data
from tests.runs import contents, film, last_line
from video import shards
from video.batches import ShardPairs

fails = functools.partial(last_line, program=data)

threads = torch.get_num_threads()
shards.quieten()  # what FFmpeg may say is settled at its first use in a process
torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(4):
        film(folder / f"{i}.mp4", seed=i)
    film(folder / "still.mp4", pan=0, frames=20)
    return folder


ARGUMENTS = ("--size", "64", "--pairs", "6")


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """One process, without a break: 30 pairs in shards of 8, of which the still clip's are rejected."""
    out = tmp_path_factory.mktemp("made") / "pairs"
    data.main([str(clips), "--out", str(out), *ARGUMENTS, "--preview"])
    return out


def keys(out):
    names = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    return [name.split(".")[0] for name in names]


def test_shards_and_manifest(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["totals"]["still"] == 6 and manifest["totals"]["kept"] >= 16 and manifest["shards"] == 4
    assert sum(manifest["totals"].values()) == 30
    names = keys(made)
    assert len(names) == 5 * manifest["totals"]["kept"] and len(set(names)) == manifest["totals"]["kept"]
    assert len(list(ShardPairs(made, epochs=1))) == ShardPairs(made).pairs == len(set(names))
    assert (made / "pairs-000000.png").exists() and not [p for p in made.iterdir() if p.name.startswith(".")]


def test_two_machines_make_the_same(clips, made, tmp_path, monkeypatch, capsys):
    data.main([str(clips), "--out", str(tmp_path), *ARGUMENTS, "--shard", "1/2"])
    assert {p.name for p in tmp_path.glob("*.json")} == {"manifest.json", "pairs-000001.json", "pairs-000003.json"}
    assert "2 of 4 shards are there" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    data.main([str(clips), "--out", str(tmp_path), *ARGUMENTS])
    assert contents(tmp_path) == contents(made)


def leave_halves(out):
    """What a kill leaves: in the middle of writing, and between a shard and its .json with the disk's worst."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (out / f".pairs-000002.tar.{dead.pid}").write_bytes(b"half")
    (out / "pairs-000001.tar").write_bytes(b"torn")
    (out / "pairs-000001.json").unlink(missing_ok=True)
    (out / "pairs-000002.json").unlink(missing_ok=True)


def test_a_run_goes_on_over_what_a_kill_left(clips, made, tmp_path):
    for name, content in contents(made).items():
        (tmp_path / name).write_bytes(content)
    leave_halves(tmp_path)
    data.main([str(clips), "--out", str(tmp_path), *ARGUMENTS])
    assert contents(tmp_path) == contents(made)


def test_a_full_disk_leaves_nothing_half_written(clips, tmp_path, capsys, monkeypatch):
    real, members = tarfile.TarFile.addfile, []

    def addfile(self, member, *rest):
        members.append(member)
        if len(members) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, member, *rest)

    with monkeypatch.context() as m:
        m.setattr(tarfile.TarFile, "addfile", addfile)
        line = fails(capsys, clips / "0.mp4", "--out", tmp_path, "--size", 64, "--pairs", 4)
    assert "No space left on device" in line
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    data.main([str(clips / "0.mp4"), "--out", str(tmp_path), "--size", "64", "--pairs", "4"])
    assert len(set(keys(tmp_path))) >= 2


def test_clips_are_added_to_a_finished_run(clips, made, tmp_path, capsys):
    folder, out = tmp_path / clips.name, tmp_path / "out"
    shutil.copytree(clips, folder)
    shutil.copytree(made, out)
    before = contents(out)
    film(folder / "11.mp4", seed=5)  # among the others, by its name
    film(tmp_path / "late.mp4", seed=6)
    for more in ([folder], [tmp_path / "late.mp4", folder]):
        data.main([*map(str, more), "--out", str(out), *ARGUMENTS])
        assert "1 clips are added to the" in capsys.readouterr().out
    after = contents(out)
    shards_before = [name for name in before if name != "manifest.json"]
    assert all(after[name] == before[name] for name in shards_before)
    manifest = json.loads(after["manifest.json"])
    assert (manifest["clips"], manifest["shards"], manifest["runs"]) == (7, 6, [5, 1, 1])
    assert sum(manifest["totals"].values()) == 42
    assert [Path(name).name for name in manifest["names"][5:]] == ["11.mp4", "late.mp4"]
    assert len(set(keys(out))) == ShardPairs(out).pairs == manifest["totals"]["kept"]
    capsys.readouterr()
    data.main([str(folder), str(tmp_path / "late.mp4"), "--out", str(out), *ARGUMENTS])  # nothing is left to do
    assert contents(out) == after and "6 of 6 shards are there" in capsys.readouterr().out

    # A clip is missing, the run is not finished, the manifest is damaged, or it is of before it held names.
    line = fails(capsys, folder, "--out", out, *ARGUMENTS)
    assert "begun with other clips, as late.mp4" in line
    more = (clips, tmp_path / "late.mp4", "--out", out, *ARGUMENTS)
    older = json.loads(before["manifest.json"])
    del older["totals"]
    (out / "manifest.json").write_text(json.dumps(older))
    assert "is not finished" in fails(capsys, *more)
    older["names"][0] = "another"
    (out / "manifest.json").write_text(json.dumps(older))
    assert "manifest.json is damaged" in fails(capsys, *more)
    del older["names"], older["runs"]
    older["totals"] = {}
    (out / "manifest.json").write_text(json.dumps(older))
    assert "begun with other clips" in fails(capsys, tmp_path / "late.mp4", clips, "--out", out, *ARGUMENTS)
    data.main([*map(str, more), "--shard", "0/40"])
    assert json.loads((out / "manifest.json").read_text())["runs"] == [5, 1]


def test_shards_beside_the_clips_are_no_clips(tmp_path, capsys):
    film(tmp_path / "a.mp4", seed=1)
    for _ in range(2):
        data.main([str(tmp_path), "--out", str(tmp_path / "pairs"), "--size", "64", "--pairs", "3", "--preview"])
    assert (tmp_path / "pairs" / "pairs-000000.png").exists()
    assert json.loads((tmp_path / "pairs" / "manifest.json").read_text())["clips"] == 1
    assert "warning" not in capsys.readouterr().err


def test_a_failed_start_leaves_no_empty_folder(clips, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fail)
        assert "No space left" in fails(capsys, clips, "--out", tmp_path / "out", *ARGUMENTS)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_in_one_line(clips, made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "holds no video and no frames" in fails(capsys, tmp_path / "empty", "--out", out)
    assert "there is no file or folder" in fails(capsys, tmp_path / "nowhere", "--out", out)
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/out"):
        assert "file a folder, and yours?" in fails(capsys, clips, "--out", tmp_path / path)
    assert "the name is empty" in fails(capsys, clips, "--out", "")
    assert "the name is empty" in fails(capsys, "", "--out", out)
    assert "is no part" in fails(capsys, clips, "--out", out, "--shard", "2/2")
    assert "whole number in 32" in fails(capsys, clips, "--out", out, "--size", "7")
    assert "invalid choice: 'farneback'" in fails(capsys, clips, "--out", out, "--flow", "farneback")
    assert "--device are for --flow raft, --segments sam" in fails(capsys, clips, "--out", out, "--device", "cpu")
    assert "begun with other recipe" in fails(capsys, clips, "--out", made, "--size", 96)
    assert "begun with other clips" in fails(capsys, clips / "0.mp4", "--out", made, *ARGUMENTS)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.tar").write_text("")
    assert "no manifest.json" in fails(capsys, clips, "--out", tmp_path / "foreign")
    monkeypatch.setenv("RANK", "7")
    assert "RANK and WORLD_SIZE" in fails(capsys, clips, "--out", out)


def test_webdataset_opens_the_shards(made):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(made.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(urls) > 1 and len(samples) == ShardPairs(made).pairs
    for sample in samples:
        assert {"ref.jpg", "gt.jpg", "flow.png", "affine.png", "json"} <= set(sample)
        assert sample["ref.jpg"].shape == sample["gt.jpg"].shape == (64, 64, 3) and sample["json"]["size"] == 64
