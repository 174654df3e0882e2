"""Magic Fixup beside the released program.

tests/released.py computes what the release computes; `test_as_the_released_program` holds both to the real one where a
checkout of it is at hand (MAGICFIXUP=/path/to/MagicFixup pytest tests/parity/test_mfx.py; needs einops).
"""

import os
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mfx
import unet
import vae
from checkpoints.parts import SkipInit
from tests import small
from tests.released import PlainMagicFixup, released_tensors, write_released
from tests.small import edit, relative_error


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


def test_forward_as_the_release(released):
    plain, path = released
    ours = mfx.load(path)
    assert ours.schedule.name == "zero_snr" and len(ours.synthesizer.transformer_blocks()) == 6
    reference, coarse, mask = edit(4, batch=2)
    x_t, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    t = torch.tensor([30, 870])
    got, want = ours(x_t, t, reference, coarse, mask, noise), plain(x_t, t, reference, coarse, mask, noise)
    assert relative_error(got, want) <= 1e-4
    assert relative_error(ours(x_t, t, reference.flip(2), coarse, mask, noise), want) > 1e-2  # it does look there


@torch.no_grad()
def test_ddim_as_the_release(released):
    plain, path = released
    reference, coarse, mask = edit(4)

    def noise(t):
        return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(t))

    got = mfx.load(path).sample(reference, coarse, mask, seeds=[9], steps=10, eta=0.0, noise=noise)
    assert relative_error(got, plain.ddim(10, noise(9), reference, coarse, mask, noise)) <= 1e-4


def test_the_layout_at_full_size(tmp_path):
    """Every tensor of the release at Stable Diffusion 1.4's size, each a view of a single number."""
    with torch.device("meta"), SkipInit():
        plain = PlainMagicFixup(width=320, times=(1, 2, 4, 4), attends=(True, True, True, False), context=768)
        parts = dict(unet=unet.UNet(small.SD1), vae=vae.VAE(vae.VAEConfig()), text=nn.Module(), xl=None)
        stable = types.SimpleNamespace(**parts)
        stable.text.config = small.TEXT
    tensors = {k: torch.zeros(()).expand(v.shape) for k, v in released_tensors(plain, stable).items()}
    torch.save({"state_dict": tensors}, tmp_path / "full.ckpt")
    ours = mfx.load(tmp_path / "full.ckpt")
    assert ours.synthesizer.config == replace(unet.CONFIGS["sd1"], in_channels=9, context=None)
    assert len(ours.synthesizer.transformer_blocks()) == 16 and ours.size == 512
    assert ours.vae.config == vae.VAEConfig()


def released_program(monkeypatch, folder):
    """The real thing, at Plain's size, without what it imports and does not use here."""
    pytest.importorskip("einops")

    def stub(name, **content):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

    module = type("LightningModule", (nn.Module,), {"device": torch.device("cpu")})
    stub("pytorch_lightning", LightningModule=module)
    stub("pytorch_lightning.utilities")
    stub("pytorch_lightning.utilities.rank_zero", rank_zero_only=lambda f: f)
    stub("omegaconf")
    stub("omegaconf.listconfig", ListConfig=tuple)
    stub("torchvision")
    stub("torchvision.utils", make_grid=None)
    stub("torchvision.transforms", Resize=None)
    stub("torchvision.transforms.functional", resize=lambda x, size: F.interpolate(x.float(), size=tuple(size)))
    for name in ("taming", "taming.modules", "taming.modules.vqvae"):
        stub(name)
    stub("taming.modules.vqvae.quantize", VectorQuantizer2=None)
    monkeypatch.syspath_prepend(folder)
    from ldm.models.diffusion import ddim, ddpm

    unet_config = dict(in_channels=9, out_channels=4, model_channels=32, num_res_blocks=2, channel_mult=[1, 2],
                       attention_resolutions=[1], image_size=16, num_heads=8, use_spatial_transformer=True,
                       context_dim=64, legacy=False)
    autoencoder = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2],
                       num_res_blocks=2, attn_resolutions=[])
    model = ddpm.LatentDiffusion(
        dict(target="ldm.models.autoencoder.AutoencoderKL",
             params=dict(embed_dim=4, ddconfig=autoencoder, lossconfig=dict(target="torch.nn.Identity"))),
        dict(target="torch.nn.Identity"),
        unet_config=dict(target="ldm.modules.diffusionmodules.openaimodel.UNetModel", params=unet_config),
        linear_start=0.00085, linear_end=0.012, timesteps=1000, first_stage_key="inpaint", cond_stage_trainable=True,
        conditioning_key="rewarp", scale_factor=0.18215, use_ema=False, context_embedding_dim=384,
    )
    sampler = ddim.DDIMSampler(model)
    sampler.register_buffer = lambda name, value: setattr(sampler, name, value)  # its own insists on a GPU
    return small.randomise(model, seed=8), sampler


@pytest.mark.skipif("MAGICFIXUP" not in os.environ, reason="needs a checkout of adobe-research/MagicFixup")
@torch.no_grad()
def test_as_the_released_program(tmp_path, monkeypatch):
    theirs, sampler = released_program(monkeypatch, os.environ["MAGICFIXUP"])
    want = {k: v.shape for k, v in theirs.state_dict().items() if k.startswith("model.")}
    assert want == {k: v.shape for k, v in PlainMagicFixup().state_dict().items()}
    torch.save(theirs.state_dict(), tmp_path / "released.pt")
    ours = mfx.load(tmp_path / "released.pt")
    assert torch.equal(ours.schedule.alphas_cumprod, theirs.alphas_cumprod)

    # It draws the reference's noise inside, and its masks exist at 64, 32, 16 and 8 tokens a side only.
    reference, coarse, mask = edit(4, h=16, w=16)
    q_sample, start = theirs.model.q_sample, theirs.q_sample

    def noise(t):
        return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(t))

    theirs.model.q_sample = lambda z, t: q_sample(z, t, noise(int(t)))
    theirs.q_sample = lambda z, t: start(z, t, noise(9))
    theirs.model.transformed_grid, context = torch.zeros(1, 2, 64, 64), torch.zeros(1, 1, 64)
    x_t, t = noise(8), torch.tensor([500])
    want = theirs.apply_model(torch.cat([x_t, coarse, mask], 1), t, context, reference)
    errors = [relative_error(ours(x_t, t, reference, coarse, mask, noise(500)), want)]
    for k in (10, 50):
        want, _ = sampler.sample(k, 1, [4, 16, 16], context, z_ref=reference, eta=0.0, x0=coarse, x0_step=1.0,
                                 verbose=False, test_model_kwargs=dict(inpaint_image=coarse, inpaint_mask=mask))
        got = ours.sample(reference, coarse, mask, seeds=[9], steps=k, eta=0.0, noise=noise)
        errors.append(relative_error(got, want))
    print("relative errors of the forward pass, of 10 and 50 steps of DDIM:", errors)
    assert max(errors) <= 1e-4
