"""Videos to pairs to shards and back; and the pairs of the toy world, where the truth is known."""

import dataclasses
import errno
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
import pairs
import warp
from pairs import ShardPairs, ToyPairs, toy_pairs
from tests.runs import contents, film, last_line, picture
from toy import world as toyworld
from video import estimators, shards

threads = torch.get_num_threads()
shards.quiet()  # what FFmpeg may say is settled at its first use in a process
torch.set_num_threads(threads)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def psnr(error):
    return -10 * torch.log10(error.square().mean()).item()


# ---------------------------------------------------------------------------------------------------------------------
# The toy world


def test_toy_pairs_are_a_function_of_the_generator():
    batch, again = toy_pairs(8, seeded(1)), toy_pairs(8, seeded(1))
    for name, channels in (("reference", 3), ("target", 3), ("coarse", 3), ("mask", 1)):
        assert batch[name].shape == (8, channels, 128, 128) and batch[name].dtype == torch.float32
        assert torch.equal(batch[name], again[name])
        assert batch[name].min() >= -1 and batch[name].max() <= 1
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(batch["target"], toy_pairs(8, seeded(2))["target"])
    flow, affine = toy_pairs(8, seeded(1), "flow"), toy_pairs(8, seeded(1), "affine")
    assert torch.equal(flow["target"], batch["target"]) and torch.equal(affine["target"], batch["target"])
    of = [[torch.equal(batch["coarse"][i], one["coarse"][i]) for i in range(8)] for one in (flow, affine)]
    assert all(a or b for a, b in zip(*of)) and not all(of[0]) and not all(of[1])  # each is the one or the other
    with pytest.raises(ValueError, match="unknown motion model 'raft': choose flow, affine, both"):
        toy_pairs(1, seeded(0), "raft")


def test_toy_items():
    items = ToyPairs(5, seed=3, size=64)
    assert len(items) == 5 and len(list(items)) == 5
    assert torch.equal(items[4]["coarse"], ToyPairs(5, seed=3, size=64)[4]["coarse"])
    assert not torch.equal(items[4]["target"], items[3]["target"])
    assert next(iter(DataLoader(items, batch_size=5)))["mask"].shape == (5, 1, 64, 64)


def test_toy_motion_is_what_users_do():
    a, b = pairs.toy_motion(400, seeded(0))
    still = (a.camera == b.camera).all(1)
    there = a.kind >= 0
    moves = ((a.x != b.x) | (a.z != b.z)) & there
    assert 0.5 < still.float().mean() < 0.7 and moves.any(1)[still].all()  # something moves in every pair
    assert 0.1 < (~moves.any(1)).float().mean() < 0.3
    assert min(a.z.min(), b.z.min()) - max(a.camera.max(), b.camera.max()) > 1.3  # in front of the camera
    seen = [toyworld.render(s, 64).segments for s in (a, b)]
    gone, new = (torch.tensor([[(f[i] == k + 1).any() and not (g[i] == k + 1).any() for k in range(3)]
                               for i in range(400)]) for f, g in (seen, seen[::-1]))
    assert 0.05 < gone.any(1).float().mean() < 0.4 and 0.01 < new.any(1).float().mean() < 0.25
    share = ((b.x / b.z - a.x / a.z).abs())[moves & still[:, None]]  # of the picture's width
    assert 0.1 < share.median() < 0.5


def test_exact_flow_splats_the_reference_onto_the_target():
    a, b = pairs.toy_motion(96, seeded(5))
    keep = (a.camera == b.camera).all(1) & (a.ground != toyworld.GROUNDS.index("water"))
    a, b = a[keep], b[keep]
    first, second = toyworld.render(a), toyworld.render(b)
    flow = toyworld.flow_between(a, b, first)
    coarse, holes = pairs.flow_edit(first.image, second.image, flow)
    ground = ((first.segments == 0) & (second.segments == 0))[:, None]
    shading = ground & ((first.image - second.image).abs().amax(1, keepdim=True) > 0.004)  # shadows that moved
    entered = torch.stack([~torch.isin(s, f.unique()) for s, f in zip(second.segments, first.segments)])[:, None]
    error = (coarse - second.image)[(~holes & ~shading & ~entered).expand(-1, 3, -1, -1)]
    plain = (first.image - second.image)[(~holes & ~shading & ~entered).expand(-1, 3, -1, -1)]
    print(f"splatted by exact flow: {psnr(error):.1f} dB, not at all: {psnr(plain):.1f} dB")
    assert psnr(error) > 30 and error.abs().median() < 1e-4
    assert (holes & (first.segments[:, None] == 0) & ground).float().mean() < 0.005  # holes are where objects were


def test_shadows_stay_where_they_were_in_the_coarse_edit():
    a, b = pairs.toy_motion(64, seeded(5))
    keep = (a.camera == b.camera).all(1)
    a, b = a[keep], b[keep]
    first, second = toyworld.render(a), toyworld.render(b)
    coarse, holes = pairs.flow_edit(first.image, second.image, toyworld.flow_between(a, b, first))
    ground = ((first.segments == 0) & (second.segments == 0))[:, None] & ~holes
    assert (coarse - first.image).abs()[ground.expand(-1, 3, -1, -1)].median() < 1e-4
    assert ((second.image - first.image).abs().amax(1, keepdim=True) > 0.1)[ground].float().mean() > 0.005


def test_flow_composed_of_ten_steps_is_the_exact_one():
    s = toyworld.random_scenes(16, seeded(7))
    velocity, camera = torch.randn(16, 3, 2, generator=seeded(8)) * 0.4, torch.randn(16, 2, generator=seeded(9)) * 0.2
    at = [toyworld.moved(s, velocity, camera, i / 10) for i in range(11)]
    frames = [toyworld.render(scene) for scene in at]
    flow = toyworld.flow_between(at[0], at[1], frames[0])
    for i in range(1, 10):
        flow = warp.compose_flow(flow, toyworld.flow_between(at[i], at[i + 1], frames[i]))
    exact = toyworld.flow_between(at[0], at[10], frames[0])
    error = (flow - exact).norm(dim=1)
    error = error[error.isfinite()]
    print(f"ten steps composed: off by {error.median():.3f} pixels at the median, {error.quantile(0.9):.3f} at 90 %")
    assert error.median() < 0.5


def test_affine_edit_of_rigid_objects_is_exact_to_the_pixel():
    a, b = pairs.toy_motion(48, seeded(5))
    first, second = toyworld.render(a), toyworld.render(b)
    flow = toyworld.flow_between(a, b, first)
    metric, offsets, colours = warp.importance(first.image, second.image, flow)[:, 0], [], []
    for i in range(len(a)):
        out, holes, source = warp.piecewise_affine_warp(first.image[i], flow[i], first.segments[i], first.depth[i],
                                                        metric[i])
        for k in range(3):
            both = torch.stack([(f.segments[i] == k + 1) for f in (first, second)]).numpy().astype(np.uint8)
            interior = torch.from_numpy(cv2.erode(both[1], np.ones((5, 5)))).bool() & ~holes
            if both[0].sum() < 30:  # a sliver at the edge of the picture says little of where the rest goes
                continue
            x, y = source[interior].T
            nearest = (y.round().long().clamp(0, 127), x.round().long().clamp(0, 127))
            inside = torch.from_numpy(cv2.erode(both[0], np.ones((3, 3)))).bool()[nearest]
            at = interior.nonzero().flip(1)[inside]
            back = (source.nan_to_num(0).permute(2, 0, 1) - grid(128))[None]
            land = (source + warp.backwarp(flow[i][None], back)[0].permute(1, 2, 0))[interior][inside]
            offsets.append((land - at).norm(dim=1))
            colours.append((out - second.image[i]).abs().amax(0)[interior][inside])
    offsets, colours = torch.cat(offsets), torch.cat(colours)
    print(f"{len(offsets)} pixels inside objects: {offsets.quantile(0.99):.3f} pixels off at 99 %, "
          f"colours {colours.quantile(0.95):.4f} at 95 %")
    assert len(offsets) > 5000 and offsets.quantile(0.99) < 0.5 and colours.median() < 0.02


def grid(size):
    return torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")).float()


# ---------------------------------------------------------------------------------------------------------------------
# From a video to a pair


SMALL = data.Recipe(size=64)


def test_a_pair_lines_up_with_its_target(tmp_path):
    film(tmp_path / "pan.mp4")
    reason, _, files, row = data.make_pair(SMALL, ("pan.mp4", tmp_path / "pan.mp4"), 0, preview=True)
    assert reason is None and len(row) == 5 and all(r.shape == (64, 64, 3) for r in row)
    told = json.loads(files["json"])
    apart = told["times"][1] - told["times"][0]
    assert 1 <= apart + 0.08 and told["source"] == "pan.mp4"
    assert told["moved_95"] == pytest.approx(apart * 25 * 0.6, abs=2)
    ref, gt = (picture(files, k).astype(float) for k in ("ref.jpg", "gt.jpg"))
    for model in ("flow", "affine"):
        coarse = picture(files, f"{model}.png")
        assert coarse.shape == (64, 64, 4) and set(np.unique(coarse[..., 3])) == {0, 255}
        kept = coarse[..., 3] == 255
        assert told[f"covered_{model}"] == pytest.approx(kept.mean(), abs=1e-4) and kept.mean() > 0.6
        assert not kept[:, -6:].any() and kept[4:-4, 8:40].mean() > 0.98  # the camera pans right: holes at the right
        error, still = (np.abs(p[..., :3] - gt)[kept].mean() for p in (coarse.astype(float), ref))
        assert error < 0.25 * still


@pytest.mark.parametrize("size", [(64, 112), (3840, 2160), (62, 50)])
def test_portrait_and_4k_and_odd(tmp_path, size):
    film(tmp_path / "a.mp4", frames=12, fps=10, size=size, pan=size[0] / 60)
    reason, _, files, _ = data.make_pair(SMALL, ("a.mp4", tmp_path / "a.mp4"), 0)
    assert reason is None and picture(files, "ref.jpg").shape == (64, 64, 3)


def test_a_short_clip_goes_as_far_as_it_can(tmp_path):
    film(tmp_path / "ten.mp4", frames=10, pan=1.5)
    reason, _, files, _ = data.make_pair(SMALL, ("ten.mp4", tmp_path / "ten.mp4"), 0)
    assert reason is None and json.loads(files["json"])["times"] == pytest.approx([0, 0.32], abs=0.05)
    film(tmp_path / "one.mp4", frames=1)
    assert data.make_pair(SMALL, ("one.mp4", tmp_path / "one.mp4"), 0)[0] == "too short"


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
    reason, message, *_ = data.make_pair(dataclasses.replace(SMALL, fps=25), clips[0], 0)
    assert reason == "broken" and "cannot be read" in message


def test_cuts_are_found_and_never_crossed(tmp_path):
    film(tmp_path / "cut.mp4", frames=80, cut=40)
    frames, times = data.read_window(tmp_path / "cut.mp4", 64, 25.0, np.random.default_rng(0))
    cuts = [data.is_cut(*two) for two in zip(frames, frames[1:])]
    assert sum(cuts) == 1 and times[cuts.index(True)] < 40 / 25 <= times[cuts.index(True) + 1]
    a, b = pairs.toy_motion(12, seeded(2))
    steps = [[(s.image.permute(0, 2, 3, 1) * 255).byte().numpy() for s in map(toyworld.render, (
        dataclasses.replace(a, x=torch.lerp(a.x, b.x, t), z=torch.lerp(a.z, b.z, t)) for t in (i / 10, (i + 1) / 10)))]
        for i in (0, 5)]
    assert sum(data.is_cut(p, q) for first, second in steps for p, q in zip(first, second)) <= 1  # 24 without a cut
    for index in range(12):
        reason, _, files, _ = data.make_pair(SMALL, ("cut.mp4", tmp_path / "cut.mp4"), index)
        if reason is None:
            i, j = json.loads(files["json"])["times"]
            assert (i < 1.6) == (j < 1.6)


def test_pairs_are_one_to_ten_seconds_apart_and_in_one_shot():
    rng, times = np.random.default_rng(0), np.arange(0, 10.001, 0.16)
    cuts = np.zeros(len(times) - 1, bool)
    apart = [times[j] - times[i] for i, j in (data.choose_pair(times, cuts, rng) for _ in range(500))]
    assert 0.9 < min(apart) < 1.5 and 9 < max(apart) < 10.1 and 4.8 < np.mean(apart) < 6.2  # uniform
    cuts[[9, 30, 31]] = True  # shots: frames 0 .. 9, 10 .. 30, 31 alone, 32 ..
    seen = {data.choose_pair(times, cuts, rng) for _ in range(500)}
    assert all(0 <= i < j <= 9 or 10 <= i < j <= 30 or 32 <= i < j for i, j in seen) and len(seen) > 100
    assert data.choose_pair(times[:3], [True, True], rng) is None
    assert data.choose_pair(times[:1], [], rng) is None
    assert data.choose_pair([0, 0.2, 0.4], [False, False], rng) == (0, 2)


def test_what_is_rejected():
    def flow(moving, share, size=512):
        f = torch.zeros(2, size, size)
        f[1, : round(share * size)] = moving
        return f

    assert data.motion_of(flow(60, 0.5))[0] is None
    assert data.motion_of(flow(40, 1))[0] == "still"
    assert data.motion_of(flow(60, 0.04))[0] == "still"  # a watermark, a fly
    assert data.motion_of(flow(400, 0.08))[0] is None
    assert data.motion_of(flow(400, 0.12))[0] == "too far"
    assert data.motion_of(flow(400 / 8, 0.12, 64))[0] == "too far"  # measured in pictures, not in pixels
    assert data.motion_of(flow(40 / 8, 1, 64))[0] == "still"


def test_too_many_holes_are_rejected(tmp_path):
    film(tmp_path / "a.mp4", frames=38, pan=1.2)  # 30 to 44 of 64 pixels: less than 0.6 are covered
    assert data.make_pair(SMALL, ("a.mp4", tmp_path / "a.mp4"), 0)[0] == "holes"
    film(tmp_path / "b.mp4", frames=38, pan=0)
    assert data.make_pair(SMALL, ("b.mp4", tmp_path / "b.mp4"), 0)[0] == "still"


def test_segments_are_the_pieces_of_the_picture():
    image = np.full((512, 512, 3), 90, np.uint8)
    image[100:300, 50:200], image[150:400, 300:450], image[20:30, 20:30] = (200, 30, 30), (30, 60, 220), 255
    labels = estimators.classical_segments(image)
    for y, x, size in ((200, 100, 200 * 150), (300, 400, 250 * 150)):
        piece = labels == labels[y, x]
        assert labels[y, x] > 0 and abs(piece.sum() - size) < 0.03 * size
    assert labels[25, 25] == 0 or (labels == labels[25, 25]).sum() >= 300  # too small to be a piece
    assert sorted(np.unique(labels[labels > 0])) == list(range(1, labels.max() + 1))
    assert (estimators.classical_segments(np.zeros((64, 64, 3), np.uint8)) == 1).all()


def test_depth_orders_what_moves_and_what_is_low():
    flow = np.zeros((2, 64, 64), np.float32)
    flow[0, 20:30, 20:30] = 30
    depth = estimators.flow_depth(np.zeros((64, 64, 3), np.uint8), flow)
    assert depth[25, 25] < depth[25, 50] and depth[60, 5] < depth[5, 5]
    assert estimators.no_depth(np.zeros((64, 64, 3), np.uint8), flow).std() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Shards


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
    return [name.split(".")[0] for path in sorted(out.glob("*.tar")) for name in tarfile.open(path).getnames()]


def test_shards_and_manifest(made, capsys):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["totals"]["still"] == 6 and manifest["totals"]["kept"] >= 16 and manifest["shards"] == 4
    assert sum(manifest["totals"].values()) == 30
    names = keys(made)
    assert len(names) == 5 * manifest["totals"]["kept"] and len(set(names)) == manifest["totals"]["kept"]
    assert (made / "pairs-000000.png").exists() and not [p for p in made.iterdir() if p.name.startswith(".")]


def test_two_workers_make_the_same(clips, made, tmp_path):
    data.main([str(clips), "--out", str(tmp_path / "out"), *ARGUMENTS, "--workers", "2"])
    assert contents(tmp_path / "out") == contents(made)


def test_two_machines_make_the_same(clips, made, tmp_path, monkeypatch, capsys):
    data.main([str(clips), "--out", str(tmp_path), *ARGUMENTS, "--shard", "1/2"])
    assert {p.name for p in tmp_path.glob("*.json")} == {"manifest.json", "pairs-000001.json", "pairs-000003.json"}
    assert "2 of 4 shards are there" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    data.main([str(clips), "--out", str(tmp_path), *ARGUMENTS])
    assert contents(tmp_path) == contents(made)


def test_kill_and_resume(clips, made, tmp_path):
    command = [sys.executable, data.__file__, str(clips), "--out", str(tmp_path), *ARGUMENTS, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not (tmp_path / "pairs-000000.json").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / ".pairs-000002.tar.1").write_bytes(b"half")  # as a kill in the middle of writing leaves it
    (tmp_path / "pairs-000001.tar").write_bytes(b"torn")  # and between a shard and its .json, with the disk's worst
    (tmp_path / "pairs-000001.json").unlink(missing_ok=True)
    data.main([str(clips), "--out", str(tmp_path), *ARGUMENTS])
    assert contents(tmp_path) == contents(made)
    end = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.time() < end:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]  # no worker outlives its parent


fails = functools.partial(last_line, program=data)


def test_what_is_wrong_is_said_in_one_line(clips, made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "holds no video and no frames" in fails(capsys, tmp_path / "empty", "--out", out)
    assert "there is no file or folder" in fails(capsys, tmp_path / "nowhere", "--out", out)
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    assert "file" in fails(capsys, clips, "--out", tmp_path / "file")
    assert "is no part" in fails(capsys, clips, "--out", out, "--shard", "2/2")
    assert "whole number in 32" in fails(capsys, clips, "--out", out, "--size", "7")
    assert "invalid choice: 'farneback'" in fails(capsys, clips, "--out", out, "--flow", "farneback")
    assert "are for --flow raft, --segments sam" in fails(capsys, clips, "--out", out, "--device", "cpu")
    assert "begun with other recipe" in fails(capsys, clips, "--out", made, "--size", 96)
    assert "begun with other clips" in fails(capsys, clips / "0.mp4", "--out", made, *ARGUMENTS)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.tar").write_text("")
    assert "no manifest.json" in fails(capsys, clips, "--out", tmp_path / "foreign")
    monkeypatch.setenv("RANK", "7")
    assert "RANK and WORLD_SIZE" in fails(capsys, clips, "--out", out)


def test_broken_videos_are_told_and_skipped(clips, tmp_path, capfd):
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
    told = [line for line in err.splitlines() if line.strip() and "pair/s" not in line]
    assert len(told) == 3 and all(line.startswith("data.py: skipped: ") for line in told), err
    assert "1 kept of 4 (rejected: broken 3)" in out


def test_a_name_that_is_not_utf8_stops_no_other_clip(clips, tmp_path, capfd):
    (tmp_path / "clips").mkdir()
    for name in (b"caf\xe9.mp4", b"plain.mp4"):
        shutil.copy(clips / "0.mp4", os.path.join(os.fsencode(tmp_path / "clips"), name))
    data.main([str(tmp_path / "clips"), "--out", str(tmp_path / "out"), *ARGUMENTS])
    sources = [json.loads(text)["source"] for text in told_of(tmp_path / "out")]
    assert sources and all(source.endswith("plain.mp4") for source in sources)
    assert "mp4 has a name that is not UTF-8: rename it" in capfd.readouterr().err


def told_of(out):
    """The JSON of every pair in the shards, as text."""
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            yield from (tar.extractfile(n).read().decode() for n in tar.getnames() if n.endswith(".json"))


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


def test_webdataset_opens_the_shards(made):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(p) for p in sorted(made.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == len(set(keys(made)))
    for sample in samples:
        assert {"ref.jpg", "gt.jpg", "flow.png", "affine.png", "json"} <= set(sample)
        assert sample["ref.jpg"].shape == sample["gt.jpg"].shape == (64, 64, 3) and sample["json"]["size"] == 64


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def places(monkeypatch):
    """Instead of the pair itself, the reader yields where it lies. (Two pairs of one short clip may be the same.)"""
    monkeypatch.setattr(pairs, "read_pair", lambda path, i, model: (path.name, i))


def test_read_pairs_are_what_was_written(made):
    everything = list(ShardPairs(made, "flow", shuffle=0, epochs=1))
    assert len(everything) == ShardPairs(made).pairs == len(set(keys(made)))
    with tarfile.open(made / "pairs-000000.tar") as tar:
        files = {name.split(".", 1)[1]: tar.extractfile(name).read() for name in tar.getnames()[:5]}
    for model in ("flow", "affine"):
        item = next(iter(ShardPairs(made, model, shuffle=0)))
        bgra = torch.from_numpy(picture(files, f"{model}.png")).permute(2, 0, 1).float()
        torch.testing.assert_close(item["coarse"], bgra[[2, 1, 0]] / 127.5 - 1)
        assert torch.equal(item["mask"], (bgra[3:] > 0).float()) and item["mask"].shape == (1, 64, 64)
        gt = torch.from_numpy(picture(files, "gt.jpg")).permute(2, 0, 1)[[2, 1, 0]]
        torch.testing.assert_close(item["target"], gt / 127.5 - 1)
        assert {k: (v.shape, v.dtype) for k, v in item.items()} == {
            k: (v[0].shape, v.dtype) for k, v in toy_pairs(1, seeded(0), size=64).items()}


def test_every_epoch_has_every_pair_in_an_order_of_its_own(made, places):
    n, everything = ShardPairs(made).pairs, list(ShardPairs(made, epochs=3))
    epochs = [everything[i * n : (i + 1) * n] for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and epochs[0] != epochs[1]
    assert len(everything) == 3 * n and len(set(everything)) == n


def test_mixture_and_exact_resume(made):
    reader = ShardPairs(made, batch=3, seed=1)
    n, items = reader.pairs, list(ShardPairs(made, batch=3, seed=1, epochs=2))
    affine = np.concatenate([reader.order(e)[2] for e in range(40)])
    assert 0.4 < affine.mean() < 0.6
    for taken in (0, 2, n // 3 + 2):  # also beyond the end of an epoch
        again = ShardPairs(made, batch=3, seed=1)
        again.load_state_dict(dict(reader.state_dict(), start=taken))
        for item, expected in zip(again, items[3 * taken :]):
            assert all(torch.equal(item[k], expected[k]) for k in item)


def test_shuffled_pairs_stay_near_their_place(made):
    shard, pair, _ = ShardPairs(made, shuffle=4).order(0)
    plain = ShardPairs(made, shuffle=0).order(0)
    assert not np.array_equal(shard * 100 + pair, plain[0] * 100 + plain[1])
    change = np.flatnonzero(np.diff(shard))
    assert len(change) < 12  # shard after shard, mixed where they meet
    assert all(abs(there - here) < 4 for s in set(shard) for here, there in enumerate(pair[shard == s]))


def test_ranks_share_the_pairs(made, places):
    whole = list(ShardPairs(made, epochs=1))
    ranks = [list(ShardPairs(made, batch=2, epochs=1, rank=r, world=3)) for r in range(3)]
    assert sorted(sum(ranks, [])) == sorted(whole) and max(map(len, ranks)) - min(map(len, ranks)) <= 2


def test_workers_share_the_pairs(made):
    reader = ShardPairs(made, batch=4, rank=1, world=2, seed=5, epochs=2)
    batches = [[b["coarse"] for b in DataLoader(reader, batch_size=4, num_workers=w)] for w in (0, 2)]
    assert len(batches[0]) == len(batches[1]) > 2 and all(map(torch.equal, *batches))
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        ShardPairs(made, rank=2, world=2)


def test_damaged_and_missing_shards_are_named(made, tmp_path):
    with pytest.raises(ValueError, match="no finished shards"):
        ShardPairs(tmp_path)
    with pytest.raises(ValueError, match="unknown motion model"):
        ShardPairs(made, "raft")
    (tmp_path / "pairs-000000.json").write_text('{"kept": 2, "rejected": {}}')
    (tmp_path / "pairs-000000.tar").write_bytes((made / "pairs-000000.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match="pairs-000000.tar is damaged"):
        list(ShardPairs(tmp_path, epochs=1))
    with tarfile.open(tmp_path / "pairs-000000.tar", "w") as tar:
        for extension in ("ref.jpg", "gt.jpg", "flow.png", "affine.png"):
            member = tarfile.TarInfo(f"000000.{extension}")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"junk"))
    pairs.contents.cache_clear()
    with pytest.raises(ValueError, match="pairs-000000.tar is damaged"):
        list(ShardPairs(tmp_path, epochs=1))
    (tmp_path / "pairs-000000.json").write_text("{")
    with pytest.raises(ValueError, match="pairs-000000.json is damaged"):
        ShardPairs(tmp_path)
