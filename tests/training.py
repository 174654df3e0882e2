"""What the tests of training share: a tiny Stable Diffusion, command lines, states, shards of pairs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clip
import diffusion
import mfx
import sd
import train
import unet
import vae
from checkpoints.configs import schedule_to_json
from checkpoints.parts import save_part
from common.files import write_json
from common.run_state import read_newest_state
from tests import small
from toy.pairs import toy_pairs
from video.shards import encode, write_shard

ROOT = Path(train.__file__).parent
UNET = unet.UNetConfig(channels=(16, 32), layers=1, depth=(1, 1), heads=2, context=32, groups=8)


def write_stable(folder):
    """A tiny Stable Diffusion of 16x16 pictures, without a tokenizer."""
    torch.manual_seed(0)
    text = clip.TextEncoder(replace(clip.CONFIGS["toy"], vocab_size=20, width=32, layers=1, heads=2))
    autoencoder = vae.VAE(vae.VAEConfig((8, 8), 1, 4, groups=4))
    save_part(small.randomise(unet.UNet(UNET)), folder / "unet", sample_size=8)
    save_part(small.randomise(autoencoder), folder / "vae")
    save_part(text, folder / "text_encoder")
    scheduler = schedule_to_json(diffusion.Schedule())
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    return folder


def tiny_vae(seed=0, width=8):
    torch.manual_seed(seed)
    return vae.VAE(vae.VAEConfig(channels=(width, width), layers=1, latent_channels=2, groups=4))


def fit_tiny(out, resume=False, recipe=None, width=8):
    """A training of it, four steps unless the recipe says otherwise -> the model"""
    model = tiny_vae(int(resume), width)

    def loss(step, part):
        x = torch.rand(2, 3, 8, 8, generator=train.generator_at(0, step)) * 2 - 1
        return (model.decode(model.encode(x)[0]) - x).square().mean()

    recipe = recipe or train.Recipe(steps=4, batch=2, lr=5e-3, warmup=3, ema=0.9, save_every=2)
    train.fit("tiny", model, loss, None, recipe, out, resume)
    return model


def random_fixup(stable):
    model = mfx.from_stable_diffusion(sd.load(stable))
    for network in (model.synthesizer, model.extractor):
        small.randomise(network, seed=4)
    return model.float()


def random_batch(n, side, C=4):
    g = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(n, C, side, side, generator=g) for name in ("reference", "target", "coarse")}
    return batch | {"mask": torch.ones(n, 1, side, side)} | mfx.draws(batch["target"].shape, g)


def arguments(stable, out, *more):
    """Of train.py, for a short training."""
    return ["--init", str(stable), "--out", str(out), "--device", "cpu", "--held-out", "2", "--pairs", "8",
            "--batch", "4", *map(str, more)]


def read_state(out, stage="mfx"):
    """-> tensors, losses, validation losses"""
    path, notes = read_newest_state(out, stage)
    return load_file(path), notes["losses"], notes["validation"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_python(*argv, check=True):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, *map(str, argv)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def fails(main, argv, capsys):
    """main(argv) ends with status 2 -> its only line on standard error, bars left out"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert len(lines) == 1
    return lines[0]


def write_shards(folder, shards=3, each=4):
    """Pairs of 16x16 pictures, as data.py writes them."""
    folder.mkdir()
    for s in range(shards):
        made = toy_pairs(each, torch.Generator().manual_seed(s), size=16)
        pairs = []
        for i in range(each):
            pixels = {name: made[name][i].permute(1, 2, 0).numpy() for name in made}
            rgb = {name: (x * 127.5 + 127.5).round().astype(np.uint8) for name, x in pixels.items()}
            alpha = (pixels["mask"] * 255).astype(np.uint8)
            warped = encode(np.concatenate([rgb["coarse"], alpha], 2), ".png")
            pairs.append((s * each + i, {
                "ref.jpg": encode(rgb["reference"], ".jpg"), "gt.jpg": encode(rgb["target"], ".jpg"),
                "flow.png": warped, "affine.png": warped}))
        write_shard(folder, s, pairs, [], {})
    return folder
