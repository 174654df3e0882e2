"""The large networks of bench/large.py beside diffusers' and transformers': narrow by default, whole with LARGE=1."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from bench import large
from tests.small import relative_error

NARROW = {  # entries of config.json
    "unet": {"block_out_channels": [64, 64, 128], "transformer_layers_per_block": 1, "attention_head_dim": [1, 1, 2]},
    "adm": {"block_out_channels": [64, 64, 64, 128], "layers_per_block": 1},
    "prior": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
    "t5": {"d_model": 64, "d_ff": 96, "num_heads": 2, "d_kv": 32, "num_layers": 2},
}


def compare(name, folder):
    large.write_random(large.NETWORKS[name], folder)
    for ours in (True, False):
        found = large.load_and_run(name, folder, ours)
        assert found["load"] > 0 and found["pass"] > 0 and found["peak"] > 2**20
    ours, theirs = (load_file(folder / f"result-{ours}")["result"] for ours in (True, False))
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    return relative_error(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", large.NETWORKS)
def test_a_narrow_one(name, tmp_path, monkeypatch):
    """Its config.json is read by both, and both compute the same."""
    network = large.NETWORKS[name]
    more = NARROW[network.part]
    if "refiner" in name:  # it has a level more
        more = more | {"block_out_channels": [64, 64, 64, 128], "attention_head_dim": [1, 1, 1, 2]}
    narrow = replace(network, config=network.config | more, dtype=torch.float32)
    monkeypatch.setitem(large.NETWORKS, name, narrow)
    assert compare(name, tmp_path) <= 1e-4


@pytest.mark.skipif(not os.environ.get("LARGE"), reason="half an hour and 20 GB: set LARGE=1")
@pytest.mark.parametrize("name", large.NETWORKS)
def test_the_whole_one(name, tmp_path):
    assert compare(name, tmp_path) <= (1e-4 if large.NETWORKS[name].dtype == torch.float32 else 0.05)
