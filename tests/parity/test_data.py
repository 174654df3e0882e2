"""data.py's shards, opened by webdataset."""

import pytest

import data
from tests.runs import film
from video.batches import ShardPairs


def test_webdataset_opens_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for i in range(2):
        film(tmp_path / f"{i}.mp4", seed=i)
    videos = [str(tmp_path / f"{i}.mp4") for i in range(2)]
    data.main([*videos, "--out", str(tmp_path / "pairs"), "--size", "64", "--pairs", "8"])
    urls = [str(path) for path in sorted((tmp_path / "pairs").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(urls) == 2 and len(samples) == ShardPairs(tmp_path / "pairs").pairs
    for sample in samples:
        assert {"ref.jpg", "gt.jpg", "flow.png", "affine.png", "json"} <= set(sample)
        assert sample["ref.jpg"].shape == sample["gt.jpg"].shape == (64, 64, 3) and sample["json"]["size"] == 64
