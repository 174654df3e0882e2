"""What the tests of -m reproduce work with: a Lab on the shipped toys, an item, tiny models of the ablation."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import mfx
import sd
import unet
from common.cli import TOY, TOY_MFX
from reproduce import cache, report
from reproduce.__main__ import ITEMS, run_item
from reproduce.lab import FALSE, OPEN, PART, TRUE, Item, Lab, Outcome, judge
from reproduce.mfx_tables import ALONE, TRAINED
from tests.small import randomise, small_image_encoder


def make_lab(out, **options):
    usual = dict(weights=TOY, mfx_weights=TOY_MFX, inpainting_weights=None, instruct_weights=None, images=None,
                 networks=None, quick=True, as_paper=False, ablation_weights=Path(out, "none"),
                 prompt="snow at night", out=out)
    return Lab(SimpleNamespace(**usual | options))


def make_item(run=None, **rest):
    run = run or (lambda lab: Outcome({"value": 1}, judge((True, "so")), [["value"], ["1"]]))
    return Item("probe", "Figure 0", "A claim. And more.", "Done {value} times.", run, **rest)


def save_ablation(folder):
    """The four models of the ablation on random weights, narrow, for the toy's latents."""
    toy = sd.load(TOY, torch.float32)
    C = toy.vae.config.latent_channels
    config = unet.UNetConfig(C, C, (16, 16), layers=1, depth=(1, 0), heads=2, context=8, groups=8)
    narrow = replace(toy, unet=unet.UNet(config))
    for seed, name in enumerate(TRAINED):
        encoder = small_image_encoder() if name == ALONE else None
        model = mfx.from_stable_diffusion(narrow, image_encoder=encoder)
        for part in (model.synthesizer, model.extractor):
            if part:
                randomise(part, seed)
        mfx.save(model, folder / name / "model", vae=str(TOY / "vae"))
    return folder


def run_on_page(name, lab):
    """Run an item; see that it is kept, and that the page has its verdict, table and pictures. -> its Outcome"""
    item = ITEMS[name]
    entry = run_item(item, lab, "key")
    assert cache.read(item, "key", lab.out, lab.quick) == entry
    outcome = entry.outcome
    verdict, why = outcome.verdict
    assert verdict in (TRUE, PART, FALSE, OPEN) and why
    assert all(len(row) <= len(outcome.table[0]) for row in outcome.table)
    text = report.write_page([entry], {})
    assert item.where in text and text.count("<img") == len(outcome.pictures)
    return outcome
