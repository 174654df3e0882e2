"""video/: clips of any kind, broken ones, and shards that are damaged."""

import dataclasses
import functools
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch

import data
from data import Rejected
from tests.runs import film, last_line, picture
from tests.toy import seeded
from toy.pairs import toy_motion
from toy.world import render
from video import shards
from video.batches import ShardPairs

fails = functools.partial(last_line, program=data)
SMALL = data.PairRecipe(size=64)

threads = torch.get_num_threads()
shards.quieten()  # what FFmpeg may say is settled at its first use in a process
torch.set_num_threads(threads)

# ---------------------------------------------------------------------------------------------------------------------
# Clips


@pytest.mark.parametrize("size", [(64, 112), pytest.param((3840, 2160), marks=pytest.mark.slow), (62, 50)])
def test_portrait_and_4k_and_odd(tmp_path, size):
    film(tmp_path / "a.mp4", frames=12, fps=10, size=size, pan=size[0] / 60)
    files, _ = data.make_pair(SMALL, ("a.mp4", tmp_path / "a.mp4"), 0)
    assert picture(files, "ref.jpg").shape == (64, 64, 3)


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    film(tmp_path / "shot")
    film(tmp_path / "shot.mp4")
    (tmp_path / "notes.txt").write_text("hello")
    clips = data.find_clips([tmp_path])
    assert [name for name, _ in clips] == [f"{tmp_path.name}/shot", f"{tmp_path.name}/shot.mp4"]
    rng = [np.random.default_rng(0) for _ in range(2)]
    frames, times = data.read_window(clips[0][1], 64, 25.0, rng[0])
    filmed, also = data.read_window(clips[1][1], 64, 1.0, rng[1])
    apart = np.abs(np.array(frames)[:, None].astype(float) - np.array(filmed)[None]).mean((2, 3, 4))
    assert times == also and (apart.argmin(0) == range(len(times))).all()
    for path in (tmp_path / "shot").iterdir():
        os.truncate(path, 10)
    with pytest.raises(Rejected) as e:
        data.make_pair(dataclasses.replace(SMALL, fps=25), clips[0], 0)
    assert e.value.reason == "broken" and "cannot be read" in e.value.message


def test_cuts_are_found_and_never_crossed(tmp_path):
    film(tmp_path / "cut.mp4", frames=80, cut=40)
    frames, times = data.read_window(tmp_path / "cut.mp4", 64, 25.0, np.random.default_rng(0))
    cuts = [data.is_cut(*two) for two in zip(frames, frames[1:])]
    assert sum(cuts) == 1 and times[cuts.index(True)] < 40 / 25 <= times[cuts.index(True) + 1]
    whole = 0
    for index in range(12):
        try:
            files, _ = data.make_pair(SMALL, ("cut.mp4", tmp_path / "cut.mp4"), index)
        except Rejected:
            continue
        i, j = json.loads(files["json"])["times"]
        assert (i < 1.6) == (j < 1.6)
        whole += 1
    assert whole


def test_motion_is_no_cut():
    a, b = toy_motion(12, seeded(2))
    seen = 0
    for i in (0, 5):
        steps = []
        for t in (i / 10, (i + 1) / 10):
            between = dataclasses.replace(a, x=torch.lerp(a.x, b.x, t), z=torch.lerp(a.z, b.z, t))
            steps.append((render(between).image.permute(0, 2, 3, 1) * 255).byte().numpy())
        seen += sum(data.is_cut(p, q) for p, q in zip(*steps))
    assert seen <= 1  # of 24


def test_broken_videos_are_named_and_skipped(tmp_path, capfd):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "text.mp4").write_text("this is no video")
    assert "nothing to train on" in fails(capfd, folder, "--out", tmp_path / "none")
    film(folder / "good.mp4")
    whole = (folder / "good.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    capfd.readouterr()
    data.main([str(folder), "--out", str(tmp_path / "out"), "--size", "64"])
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.strip() and "pair/s" not in line]
    assert len(lines) == 3 and all(line.startswith("data.py: skipped: ") for line in lines), err
    assert "1 kept of 4 (rejected: broken 3)" in out


def test_a_name_that_is_not_utf8_stops_no_other_clip(tmp_path, capfd):
    (tmp_path / "clips").mkdir()
    film(tmp_path / "clips" / "plain.mp4")
    strange = os.path.join(os.fsencode(tmp_path / "clips"), b"caf\xe9.mp4")
    with open(strange, "wb") as file:
        file.write((tmp_path / "clips" / "plain.mp4").read_bytes())
    data.main([str(tmp_path / "clips"), "--out", str(tmp_path / "out"), "--size", "64", "--pairs", "6"])
    sources = []
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            about = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
            sources += [a["source"] for a in about]
    assert sources and all(source.endswith("plain.mp4") for source in sources)
    assert "mp4 has a name that is not UTF-8: rename it" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def write_done(folder, text='{"kept": 2, "rejected": {}}'):
    (folder / "pairs-000000.json").write_text(text)


def test_missing_shards_and_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="no finished shards"):
        ShardPairs(tmp_path)
    with pytest.raises(ValueError, match="unknown motion model"):
        ShardPairs(tmp_path, "raft")
    write_done(tmp_path)
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        ShardPairs(tmp_path, rank=2, world=2)
    for text in ("{", "[]", '{"rejected": {}}'):
        write_done(tmp_path, text)
        with pytest.raises(ValueError, match="pairs-000000.json is damaged"):
            ShardPairs(tmp_path)


@pytest.mark.parametrize("junk", [b"junk", b""])
def test_damaged_shards_are_named(tmp_path, junk):
    files = {extension: junk for extension in ("ref.jpg", "gt.jpg", "flow.png", "affine.png")}
    shards.write_shard(tmp_path, 0, [(0, files), (1, files)], [], {})
    shards.read_index.cache_clear()
    with pytest.raises(ValueError, match="pairs-000000.tar is damaged"):
        list(ShardPairs(tmp_path, epochs=1))


def test_torn_shards_are_named(tmp_path):
    rest = {extension: bytes(1000) for extension in ("ref.jpg", "gt.jpg", "flow.png", "affine.png")}
    shards.write_shard(tmp_path, 0, [(0, rest)], [], {})
    whole = (tmp_path / "pairs-000000.tar").read_bytes()
    (tmp_path / "pairs-000000.tar").write_bytes(whole[:3000])
    shards.read_index.cache_clear()
    with pytest.raises(ValueError, match="pairs-000000.tar is damaged"):
        list(ShardPairs(tmp_path, epochs=1))
    with tarfile.open(tmp_path / "pairs-000000.tar", "w") as tar:  # pictures missing
        member = tarfile.TarInfo("000000.ref.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"junk"))
    shards.read_index.cache_clear()
    with pytest.raises(ValueError, match="pair 0 cannot be read"):
        list(ShardPairs(tmp_path, epochs=1))
