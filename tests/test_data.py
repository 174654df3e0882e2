"""data.py: from a video to a pair, and the order in which pairs are read."""

import json
import os
import signal
import tarfile
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from data import Rejected
from tests.runs import film, picture
from tests.toy import seeded
from toy.pairs import toy_pairs
from video import batches, estimators, shards
from video.batches import ShardPairs

SMALL = data.PairRecipe(size=64)

# --- From a video to a pair -----------------------------------------------------------------------


def test_a_pair_lines_up_with_its_target(tmp_path):
    film(tmp_path / "pan.mp4")
    files, row = data.make_pair(SMALL, ("pan.mp4", tmp_path / "pan.mp4"), 0, preview=True)
    assert len(row) == 5 and all(r.shape == (64, 64, 3) for r in row)
    about = json.loads(files["json"])
    apart = about["times"][1] - about["times"][0]
    assert 1 <= apart + 0.08 and about["source"] == "pan.mp4"
    assert about["moved_95"] == pytest.approx(apart * 25 * 0.6, abs=2)
    ref, gt = (picture(files, k).astype(float) for k in ("ref.jpg", "gt.jpg"))
    for model in ("flow", "affine"):
        coarse = picture(files, f"{model}.png")
        assert coarse.shape == (64, 64, 4) and set(np.unique(coarse[..., 3])) == {0, 255}
        kept = coarse[..., 3] == 255
        assert about[f"covered_{model}"] == pytest.approx(kept.mean(), abs=1e-4)
        assert kept.mean() > 0.6
        # The camera pans right: holes at the right.
        assert not kept[:, -6:].any() and kept[4:-4, 8:40].mean() > 0.98
        error, still = (np.abs(p[..., :3] - gt)[kept].mean() for p in (coarse.astype(float), ref))
        assert error < 0.25 * still


def test_a_short_clip_goes_as_far_as_it_can(tmp_path):
    film(tmp_path / "ten.mp4", frames=10, pan=1.5)
    files, _ = data.make_pair(SMALL, ("ten.mp4", tmp_path / "ten.mp4"), 0)
    assert json.loads(files["json"])["times"] == pytest.approx([0, 0.32], abs=0.05)
    film(tmp_path / "one.mp4", frames=1)
    with pytest.raises(Rejected, match="too short"):
        data.make_pair(SMALL, ("one.mp4", tmp_path / "one.mp4"), 0)


def test_pairs_are_one_to_ten_seconds_apart_and_in_one_shot():
    rng, times = np.random.default_rng(0), np.arange(0, 10.001, 0.16)
    cuts = np.zeros(len(times) - 1, bool)
    chosen = [data.choose_frames(times, cuts, rng) for _ in range(500)]
    apart = [times[j] - times[i] for i, j in chosen]
    assert 0.9 < min(apart) < 1.5 and 9 < max(apart) < 10.1 and 4.8 < np.mean(apart) < 6.2
    cuts[[9, 30, 31]] = True  # shots: frames 0 .. 9, 10 .. 30, 31 alone, 32 ..
    seen = {data.choose_frames(times, cuts, rng) for _ in range(500)}
    tenths = [k / 10 for k in range(125)]
    whole = [data.choose_frames(tenths, [False] * 124, rng, as_paper=True) for _ in range(200)]
    assert {j - i for i, j in whole} == {10 * seconds for seconds in range(1, 11)}
    assert all(0 <= i < j <= 9 or 10 <= i < j <= 30 or 32 <= i < j for i, j in seen)
    assert len(seen) > 100
    for short in ((times[:3], [True, True]), (times[:1], []), ([0.5, 0.5], [False]), ([], [])):
        with pytest.raises(Rejected, match="too short"):
            data.choose_frames(*short, rng)
    assert data.choose_frames([0, 0.2, 0.4], [False, False], rng) == (0, 2)


def test_a_stretch_of_flows_is_estimated_once_and_together():
    asked, frames, known = [], list(range(10)), {}

    def estimate(frames):
        asked.append(frames)
        return [10 * a + b for a, b in zip(frames, frames[1:])]

    def flows(i, j):
        asked.clear()
        steps = data.estimate_steps(estimate, frames, i, j, known)
        assert steps == [11 * k + 1 for k in range(i, j)]
        return asked

    assert flows(3, 5) == [[3, 4, 5]]
    assert flows(3, 5) == []
    assert flows(1, 7) == [[1, 2, 3], [5, 6, 7]]  # on both sides of what is known
    assert flows(0, 9) == [[0, 1], [7, 8, 9]]


def rejection(make, *arguments):
    """-> the reason to reject a pair, or None"""
    try:
        make(*arguments)
    except Rejected as e:
        return e.reason


@pytest.mark.parametrize("moving, share, size, reason", [
    (60, 0.5, 512, None),
    (40, 1, 512, "still"),
    (60, 0.04, 512, "still"),  # a watermark, a fly
    (400, 0.08, 512, None),
    (400, 0.12, 512, "too far"),
    (400 / 8, 0.12, 64, "too far"),  # measured in pictures, not in pixels
    (40 / 8, 1, 64, "still"),
])
def test_what_is_rejected(moving, share, size, reason):
    flow = torch.zeros(2, size, size)
    flow[1, : round(share * size)] = moving
    assert rejection(data.measure_motion, flow) == reason


def test_too_many_holes_are_rejected(tmp_path):
    film(tmp_path / "a.mp4", frames=38, pan=1.2)  # 30 to 44 of 64 pixels: less than 0.6 are covered
    assert rejection(data.make_pair, SMALL, ("a.mp4", tmp_path / "a.mp4"), 0) == "holes"
    film(tmp_path / "b.mp4", frames=38, pan=0)
    assert rejection(data.make_pair, SMALL, ("b.mp4", tmp_path / "b.mp4"), 0) == "still"


def test_segments_are_the_pieces_of_the_picture():
    image = np.full((512, 512, 3), 90, np.uint8)
    image[100:300, 50:200], image[150:400, 300:450] = (200, 30, 30), (30, 60, 220)
    image[20:30, 20:30] = 255
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


# --- The work -------------------------------------------------------------------------------------


def test_what_is_added_leaves_the_work_before_it():
    first = shards.list_work(1000)
    assert [k for numbers in first for k in numbers] == list(range(1000))
    more = shards.list_work(1000, 30_000, 3)
    assert more[: len(first)] == first and [k for numbers in more for k in numbers] == list(range(31_003))
    assert max(map(len, more)) == 256


def kill(process, number):
    if process == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.environ["LOCAL_RANK"]


@pytest.mark.slow
def test_a_task_that_kills_its_process_is_lost_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "6")
    got = list(shards.run_in_order(kill, ((5, i) for i in range(20)), 2, lambda _, i: (-i, "7")))
    assert [i for i, _ in got] == [*range(5), -5, *range(6, 20)] and {rank for _, rank in got} <= {"6", "7"}
    with pytest.raises(BrokenProcessPool):
        list(shards.run_in_order(kill, ((i, i) for i in range(20)), 2, lambda *_: None))


@pytest.mark.parametrize("device, rank, own", [("cuda", "6", "cuda:2"), ("cuda:1", "6", "cuda:1"), ("cpu", "6", "cpu")])
def test_processes_take_gpus_in_turn(monkeypatch, device, rank, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(estimators.published, "load", lambda kind, path, device: device)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert estimators.load_model.__wrapped__("raft", None, torch.device(device)) == torch.device(own)


def test_clips_keep_their_order_and_new_ones_come_last(tmp_path):
    found = [("b", 1), ("a", 2), ("b", 3), ("c", 4)]  # files of one name in two folders
    assert shards.order_clips(tmp_path, found, []) == found
    more = [("0", 0), ("a", 2), ("b", 1), ("aa", 5), ("b", 3), ("c", 4), ("b", 6)]
    assert shards.order_clips(tmp_path, more, [name for name, _ in found]) == [
        *found, ("0", 0), ("aa", 5), ("b", 6)]
    with pytest.raises(ValueError, match="as b: choose"):
        shards.order_clips(tmp_path, found[1:], [name for name, _ in found])


# --- Reading --------------------------------------------------------------------------------------


def encode(extension, array):
    return cv2.imencode(f".{extension}", array)[1].tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """18 pairs of noise in three shards of 8, 4 and 6, and an empty one."""
    out = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for s, count in enumerate((8, 4, 0, 6)):
        pairs = []
        for k in range(8 * s, 8 * s + count):
            ref, gt = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
            flow, affine = rng.integers(0, 256, (2, 64, 64, 4), np.uint8)
            for rgba in (flow, affine):
                rgba[..., 3] = np.where(rgba[..., 3] < 64, 0, 255)
            pairs.append((k, {
                "flow.png": encode("png", flow), "affine.png": encode("png", affine),
                "ref.jpg": encode("jpg", ref), "gt.jpg": encode("jpg", gt), "json": b"{}"}))
        shards.write_shard(out, s, pairs, [], {})
    return out


@pytest.fixture
def places(monkeypatch):
    """reader -> [where each of its pairs lies], without reading any"""

    def read_pair(path, i, model):
        return {"mask": torch.zeros(1, 64, 64), "place": (path.name, i)}

    monkeypatch.setattr(batches, "read_pair", read_pair)
    return lambda reader: [pair["place"] for pair in reader]


def test_read_pairs_are_what_was_written(made):
    assert len(list(ShardPairs(made, "flow", shuffle=0, epochs=1))) == ShardPairs(made).pairs == 18
    with tarfile.open(made / "pairs-000000.tar") as tar:
        names = tar.getnames()[:5]
        files = {name.split(".", 1)[1]: tar.extractfile(name).read() for name in names}
    for model in ("flow", "affine"):
        item = next(iter(ShardPairs(made, model, shuffle=0)))
        bgra = torch.from_numpy(picture(files, f"{model}.png")).permute(2, 0, 1).float()
        torch.testing.assert_close(item["coarse"], bgra[[2, 1, 0]] / 127.5 - 1)
        assert torch.equal(item["mask"], (bgra[3:] > 0).float())
        gt = torch.from_numpy(picture(files, "gt.jpg")).permute(2, 0, 1)[[2, 1, 0]]
        torch.testing.assert_close(item["target"], gt / 127.5 - 1)
        toy = toy_pairs(1, seeded(0), size=64)
        assert {k: (v.shape, v.dtype) for k, v in item.items()} == {
            k: (v[0].shape, v.dtype) for k, v in toy.items()}


def test_every_epoch_has_every_pair_in_an_order_of_its_own(made, places):
    n, everything = 18, places(ShardPairs(made, epochs=3))
    epochs = [everything[i * n : (i + 1) * n] for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and epochs[0] != epochs[1]
    assert len(everything) == 3 * n and len(set(everything)) == n


def test_mixture_and_exact_resume(made):
    reader = ShardPairs(made, batch=3, seed=1)
    n, items = reader.pairs, list(ShardPairs(made, batch=3, seed=1, epochs=2))
    first, second = ({(s, p): a for s, p, a in zip(*map(list, reader.order(e)))} for e in (0, 1))
    assert first == {pair: not a for pair, a in second.items()}  # each pair by either model
    affine = np.concatenate([reader.order(e)[2] for e in range(40)])
    assert 0.4 < affine.mean() < 0.6
    for taken in (0, 2, n // 3 + 2):  # also beyond the end of an epoch
        again = ShardPairs(made, batch=3, seed=1, start=taken)
        for item, expected in zip(again, items[3 * taken :]):
            assert all(torch.equal(item[k], expected[k]) for k in item)


def test_shuffled_pairs_stay_near_their_place(made):
    shard, pair, _ = ShardPairs(made, shuffle=4).order(0)
    plain = ShardPairs(made, shuffle=0).order(0)
    assert not np.array_equal(shard * 100 + pair, plain[0] * 100 + plain[1])
    assert len(np.flatnonzero(np.diff(shard))) < 12  # shard after shard, mixed where they meet
    for s in set(shard):
        assert all(abs(there - here) < 4 for here, there in enumerate(pair[shard == s]))


def test_ranks_share_the_pairs(made, places):
    whole = places(ShardPairs(made, epochs=1))
    ranks = [places(ShardPairs(made, batch=2, epochs=1, rank=r, world=3)) for r in range(3)]
    assert sorted(sum(ranks, [])) == sorted(whole)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 2


def test_workers_share_the_pairs(made):
    reader = ShardPairs(made, batch=4, rank=1, world=2, seed=5, epochs=2)
    one, two = (
        [batch["coarse"] for batch in DataLoader(reader, batch_size=4, num_workers=n)] for n in (0, 2)
    )
    assert len(one) == len(two) > 2 and all(map(torch.equal, one, two))
