"""video/: clips of any kind, broken ones, and shards that are damaged."""

import dataclasses
import functools
import io
import json
import os
import tarfile

import cv2
import numpy as np
import pytest
import torch

import data
from data import Rejected
from tests.runs import film, last_line, picture
from tests.toy import seeded
from toy.pairs import toy_motion
from toy.world import render
from video import clips, shards
from video.batches import ShardPairs

fails = functools.partial(last_line, program=data)
SMALL = data.PairRecipe(size=64)

threads = torch.get_num_threads()
shards.quieten()  # what FFmpeg may say is settled at its first use in a process
torch.set_num_threads(threads)

# --- Clips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 112), pytest.param((3840, 2160), marks=pytest.mark.slow), (62, 50)])
def test_portrait_and_4k_and_odd(tmp_path, size):
    film(tmp_path / "a.mp4", frames=12, fps=10, size=size, pan=size[0] / 60)
    files, _ = data.make_pair(SMALL, ("a.mp4", tmp_path / "a.mp4"), 0)
    assert picture(files, "ref.jpg").shape == (64, 64, 3)


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    film(tmp_path / "shot")
    film(tmp_path / "shot.mp4")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.warns(UserWarning, match="1 .txt"):
        found = data.find_clips([tmp_path])
    assert [name for name, _ in found] == [f"{tmp_path.name}/shot", f"{tmp_path.name}/shot.mp4"]
    rng = [np.random.default_rng(0) for _ in range(2)]
    frames, times = data.read_window(found[0][1], 64, 25.0, rng[0])
    filmed, also = data.read_window(found[1][1], 64, 1.0, rng[1])
    apart = np.abs(np.array(frames)[:, None].astype(float) - np.array(filmed)[None]).mean((2, 3, 4))
    assert times == also and (apart.argmin(0) == range(len(times))).all()
    for path in (tmp_path / "shot").iterdir():
        os.truncate(path, 10)
    with pytest.raises(Rejected) as e:
        data.make_pair(dataclasses.replace(SMALL, fps=25), found[0], 0)
    assert e.value.reason == "broken" and "cannot be read" in e.value.message


class Recording:
    """Stands for a cv2.VideoCapture: grey frames that are shown at these times, whose level is their number. As
    OpenCV's, it seeks by a number, and may go too far."""

    def __init__(self, times, fps, count, key=0):
        self.times, self.key, self.at = times, key, -1
        self.says = {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: count}

    def open(self, name):
        self.at = -1

    def isOpened(self):
        return True

    def grab(self):
        self.at += 1
        return self.at < len(self.times)

    def retrieve(self):
        return True, np.full((8, 8, 3), self.at % 256, np.uint8)

    def set(self, _, number):
        self.at = max(int(number), self.key) - 1

    def get(self, what):
        shown = self.times[min(max(self.at, 0), len(self.times) - 1)]
        return shown * 1000 if what == cv2.CAP_PROP_POS_MSEC else self.says.get(what, 0)


EVERY = [i / 30 for i in range(1200)]
VARIES = [i / 60 for i in range(120)] + [2 + i / 2 for i in range(16)]
SLOW_FIRST = [float(i) for i in range(20)] + [20 + i / 30 for i in range(120)]


@pytest.mark.parametrize("times, fps, count, key", [
    (EVERY, 30, 1200, 0),
    (EVERY, 30, 1200, 250),  # as in transport streams: the seek goes too far
    ([5 + t for t in EVERY], 30, 1200, 0),
    ([round(t, 3) for t in EVERY], 30, 1200, 0),  # mkv
    (EVERY, 30, -(10**16), 0),  # without a duration
    ([0.0] * 100, 30, -1, 0),  # without times
    (EVERY, 60000, 10**6, 0),
    (VARIES, len(VARIES) / 9.5, len(VARIES), 0),  # mp4: the average
    (VARIES, 60, 571, 0),  # mkv: the duration by the rate of the first frames
    (SLOW_FIRST, len(SLOW_FIRST) / 24, len(SLOW_FIRST), 0),
    (SLOW_FIRST, 30, 720, 0),
    (SLOW_FIRST, 30, -1, 0),
])
def test_frames_have_the_times_at_which_they_are_shown(monkeypatch, times, fps, count, key):
    monkeypatch.setattr(cv2, "VideoCapture", lambda name: Recording(times, fps, count, key))
    true = [i / 30 for i in range(100)] if not any(times) else [t - times[0] for t in times]
    spans = set()
    for seed in range(20):
        frames, shown = clips.read_window("a.mp4", 8, 24, np.random.default_rng(seed))
        numbers = [int(frame[0, 0, 0]) for frame in frames]
        assert len(frames) > 5
        for number, t in zip(numbers, shown):  # a level is a number modulo 256
            assert min(abs(t - true[k]) for k in range(number, len(true), 256)) < 0.002
        gaps = np.diff(shown)
        assert (gaps > 0).all() and (gaps < 0.17 + np.diff(true).max()).all()
        assert shown[-1] - shown[0] < 10.1
        spans.add(round(shown[0]))
    assert len(spans) > 3 or true[-1] < 12


def test_a_clip_that_breaks_off_is_no_clip(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", lambda name: Recording(EVERY[:50], 30, 1200))
    for seed in range(4):
        with pytest.raises(ValueError, match="breaks off"):
            clips.read_window("a.mp4", 8, 24, np.random.default_rng(seed))


def test_pairs_of_rare_frames_are_one_second_apart():
    times = [*np.arange(0, 2, 0.15), 2.0, 2.7, 3.4, 4.1, 4.8, 9.5]
    rng = np.random.default_rng(0)
    chosen = [data.choose_frames(times, [False] * (len(times) - 1), rng) for _ in range(500)]
    assert min(times[j] - times[i] for i, j in chosen) > 0.85


def test_what_is_in_a_folder_is_found_or_named(tmp_path, recwarn):
    film(tmp_path / "frames", frames=3)
    film(tmp_path / "a.mp4", frames=3)
    for name in ("b.MTS", "c.m2ts", "d.mxf", "e.vob", "f.gif", "raw.braw", "note.txt", "note", "poster.jpg",
                 "frames/preview.gif"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".Trashes").mkdir()
    for name in ("._a.mp4", "frames/._frame 1.png", ".Trashes/old.mp4"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    found = [name.split("/", 1)[1] for name, _ in clips.find_clips([tmp_path])]
    assert found == ["a.mp4", "b.MTS", "c.m2ts", "d.mxf", "e.vob", "f.gif", "frames", "frames/preview.gif"]
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == 1 and said[0].endswith("by its ending: 1 .braw, 1 .jpg, 1 .txt, 1 without ending")
    assert len(clips.read_window(tmp_path / "frames", 32, 24, np.random.default_rng(0))[0]) == 2


def test_a_name_with_a_colon_and_a_picture_as_a_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "2024-11-14T22:57:44.mp4", frames=6)
    assert len(clips.read_window("2024-11-14T22:57:44.mp4", 32, 24, np.random.default_rng(0))[0]) > 1
    film(tmp_path / "frames", frames=1)
    with pytest.raises(ValueError, match="is a single picture"):
        clips.read_window("frames/frame 1.png", 32, 24, np.random.default_rng(0))


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


# --- Shards ---------------------------------------------------------------------------------------


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
    for text in ("{", "[]", '{"rejected": {}}', '{"kept": 1e999}', '{"kept": 2147483648}', '{"kept": -1}',
                 '{"kept": 2, "rejected": {"still": {}}}', "[" * 100_000):
        write_done(tmp_path, text)
        with pytest.raises(ValueError, match="pairs-000000.json is damaged"):
            ShardPairs(tmp_path)


def write_pair(folder, number=0, side=32, **changed):
    """A shard of one pair, black, but for the files that are given"""
    black = np.zeros((side, side, 4), np.uint8)
    jpg, png = shards.encode(black[..., :3], ".jpg"), shards.encode(black, ".png")
    files = {"ref.jpg": jpg, "gt.jpg": jpg, "flow.png": png, "affine.png": png}
    shards.write_shard(folder, number, [(number, files | changed)], [], {})
    shards.read_index.cache_clear()
    return folder / f"pairs-{number:06}.tar"


def refused(folder, said, **options):
    with pytest.raises(ValueError, match=said):
        list(ShardPairs(folder, "flow", epochs=1, **options))


@pytest.mark.parametrize("file, broken", [
    ("gt.jpg", np.zeros((16, 32, 3), np.uint8)), ("flow.png", np.zeros((32, 32, 4), np.uint16)),
    ("flow.png", np.zeros((32, 32, 3), np.uint8)), ("flow.png", np.zeros((32, 32), np.uint8)),
    ("ref.jpg", b"junk"), ("ref.jpg", b""),
])  # fmt: skip
def test_pictures_of_another_kind_are_named(tmp_path, file, broken):
    write_pair(tmp_path)
    assert len(list(ShardPairs(tmp_path, "flow", epochs=1))) == 1
    content = broken if isinstance(broken, bytes) else cv2.imencode(file[-4:], broken)[1].tobytes()
    write_pair(tmp_path, **{file: content})
    refused(tmp_path, "pairs-000000.tar is damaged" if isinstance(broken, bytes) else "pair 0 cannot be read")


def test_shards_of_two_sizes_are_named(tmp_path):
    write_pair(tmp_path), write_pair(tmp_path, 1, side=16)
    for held_out in (None, True):
        refused(tmp_path, "000000.tar and .*000001.tar have pictures of 32x32 and of 16x16", held_out=held_out)


def test_torn_shards_are_named(tmp_path):
    tar = write_pair(tmp_path, **{"ref.jpg": bytes(1000)})
    tar.write_bytes(tar.read_bytes()[:1300])
    refused(tmp_path, "pairs-000000.tar is damaged")
    with tarfile.open(tar, "w") as torn:  # pictures missing
        member = tarfile.TarInfo("000000.ref.jpg")
        member.size = 4
        torn.addfile(member, io.BytesIO(b"junk"))
    shards.read_index.cache_clear()
    refused(tmp_path, "pair 0 cannot be read")
