"""The papers' other methods, in reproduce/: what each promises, on small networks and on the toy."""

import pytest
import torch

import diffusion
import samplers
import sd
from common.cli import TOY
from reproduce import blended, diffedit, drag, masactrl
from tests import small
from tests.small import SHAPE, mixture, randn
from toy import world

DDIM = samplers.make_sampler("ddim", diffusion.Schedule(), 10)


@pytest.mark.slow
@torch.no_grad()
def test_ddim_inversion_returns_the_toy_s_picture():
    toy = sd.load(TOY, torch.float32)
    z = toy.encode_image(world.render(world.random_scenes(1, torch.Generator().manual_seed(5)), 64).image * 2 - 1)
    sampler, denoise = samplers.make_sampler("ddim", toy.schedule, 200), toy.denoiser("")
    back = samplers.run_sampler(denoise, samplers.invert_ddim(denoise, z, sampler, rounds=4)[0], sampler)
    assert small.relative_error(back, z) < 1e-3


def test_diffedit_changes_only_where_two_prompts_differ():
    z, g = randn(1, 4, 8, 8), torch.Generator().manual_seed(1)
    noises = [torch.randn(z.shape, generator=g) for _ in range(4)]
    shown = mixture(DDIM.ladder.schedule)
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., :3, :3] = 1

    def wanted(z, t):
        return shown(z, t) + 0.5 * corner

    out, mask = diffedit.edit(wanted, shown, shown, z, DDIM, noises)
    assert torch.equal(mask, corner.bool())
    assert torch.equal(out[..., 3:, :], z[..., 3:, :]) and (out - z).abs()[..., :3, :3].min() > 0


@pytest.mark.slow
@torch.no_grad()
def test_masactrl_reads_the_picture_and_leaves_it_alone():
    model = small.stable_diffusion()
    z = randn(2, 4, 8, 8)
    edits, pictures = masactrl.edit(model, z, ["a red circle"] * 2, 4, start=0, block=0)
    others, again = masactrl.edit(model, z, ["cats"] * 2, 4, start=0, block=0)
    torch.testing.assert_close(pictures, again)  # whatever is asked for beside it
    assert (edits - others).abs().max() > 1e-3
    free, _ = masactrl.edit(model, z, ["cats"] * 2, 4, start=1)
    assert (free - others).abs().max() > 1e-3  # the hook does something, and is gone afterwards
    torch.testing.assert_close(masactrl.edit(model, z, [""] * 2, 4, start=0, block=0)[0], pictures)


def test_a_blended_edit_shrinks_to_its_mask():
    mask = torch.ones(16, 16)
    mask[6:8, 6:8] = 0
    masks = blended.make_masks(mask, (8, 8), 2)
    assert [(~m).sum().item() for m in masks] == [25, 9, 1] and masks.shape == (3, 1, 1, 8, 8)
    z, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    kept = torch.ones(SHAPE[2:])
    out = blended.edit(mixture(DDIM.ladder.schedule), z, kept, DDIM, noise)
    assert (out - z).abs().max() < 0.2  # all but the last step's noise is the original's


@pytest.mark.slow
def test_the_decoder_learns_the_background():
    model, x, y = small.stable_diffusion(), randn(1, 3, 16, 16).tanh(), randn(1, 3, 16, 16, seed=1).tanh()
    keep = torch.ones(16, 16)
    keep[:, :4] = 0
    before = {name: w.clone() for name, w in model.vae.state_dict().items()}
    few, many = (blended.reconstruct_background(model.vae, x, y, keep, steps=n, lr=1e-3) for n in (1, 40))
    assert (many - x)[..., 4:].square().mean() < 0.8 * (few - x)[..., 4:].square().mean()
    assert all(torch.equal(w, before[name]) for name, w in model.vae.state_dict().items())


def test_dragging_moves_what_the_features_show_and_keeps_the_rest():
    """As if the latent were its own features: a spot goes to the right, and the left stays."""
    p = torch.arange(16.0)
    z = torch.exp(-((p - 5) ** 2 + (p[:, None] - 8) ** 2) / 4)[None, None] + 0.1 * p / 16
    keep = torch.zeros(1, 1, 16, 16)
    keep[..., :2] = 1
    handle, target = torch.tensor([[5.0, 8.0]]), torch.tensor([[9.0, 8.0]])
    out, h = drag.drag(lambda z: (z, z), z, keep, handle, target, 200)
    assert h.tolist() == target.tolist() and out[0, 0, 8].argmax() > 6
    assert (out - z)[..., :2].abs().max() < 0.05 < (out - z).abs().max()
    assert torch.equal(drag.drag(lambda z: (z, z), z, keep, handle, handle, 9)[0], z)  # nowhere to go


def test_features_are_looked_at_between_pixels():
    x = torch.arange(12.0).view(1, 1, 3, 4)  # x + 4 y
    assert drag.look(x, torch.tensor([[[1.0, 2.0], [2.5, 0.5]]])).flatten().tolist() == [9, 4.5]


@pytest.mark.slow
@torch.inference_mode()
def test_dragdiffusion_tunes_a_copy_and_drags_with_it():
    model, z = small.stable_diffusion(), randn(1, 4, 8, 8)
    before = {name: w.clone() for name, w in model.unet.state_dict().items()}
    points = torch.tensor([[3.0, 3.0]])
    edits = [drag.edit(model, z, "cats", torch.zeros(1, 1, 16, 16), points, points + far, k=4, steps=3)
             for far in (0, 6, 6)]
    assert torch.equal(edits[1][0], edits[2][0]) and (edits[0][0] - edits[1][0]).abs().max() > 1e-4
    assert edits[0][1].item() == 0 < edits[1][1].item()
    assert all(torch.equal(w, before[name]) for name, w in model.unet.state_dict().items())
