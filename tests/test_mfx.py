"""mfx.py: what must hold of Magic Fixup, whatever its weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffdiff
import diffusion
import mfx
import samplers
import sd
import unet
import vae
from checkpoints.parts import save_part
from tests import small
from tests.released import write_released
from tests.small import count_calls, edit, magic_fixup, relative_error, same_weights, training_batch, without_text


@pytest.fixture(scope="module")
def model():
    return magic_fixup()


# --- From Stable Diffusion ------------------------------------------------------------------------


@pytest.mark.parametrize("C", [12, 4])
def test_begins_as_stable_diffusion_without_its_text(C):
    C_in = 2 * C + 1 if C == 4 else C  # 4: for inpainting
    stable = without_text(replace(small.TOY, in_channels=C_in, out_channels=C))
    new = mfx.from_stable_diffusion(stable)
    textless = unet.UNet(replace(stable.unet.config, context=0))
    textless.load_state_dict(stable.unet.state_dict(), strict=False)
    textless.conv_in.weight.data[:, C:] = 0
    g = torch.Generator().manual_seed(1)
    z, t = torch.randn(2, 2 * C + 1, 8, 8, generator=g), torch.tensor([10, 900])
    nothing = [torch.zeros(2, f.shape[1], f.shape[2]) for f in new.extractor.features(z, t)]
    added = []
    for block in new.synthesizer.transformer_blocks():
        block.attn2.register_forward_hook(lambda module, args, out: added.append(out))
    got = new.synthesizer(z, t, new.synthesizer.keys_values(nothing))
    assert relative_error(got, textless(z[:, : stable.unet.config.in_channels], t, ())) <= 1e-5
    widened = unet.UNet(new.extractor.config)
    widened.load_state_dict(textless.state_dict() | {"conv_in.weight": new.extractor.conv_in.weight})
    assert relative_error(got, widened(z, t, ())) <= 1e-5
    assert len(added) == len(nothing) and not any(out.any() for out in added)  # exactly nothing
    assert not new.extractor.conv_in.weight[:, C:].any() and new.extractor.conv_in.weight[:, :C].any()
    assert not any(p.requires_grad for p in new.parameters())


def test_what_is_trained(model):
    stable = without_text()
    new = mfx.from_stable_diffusion(stable)
    parameters = new.unfreeze()
    new.loss(training_batch(), torch.Generator().manual_seed(0)).backward()
    assert {id(p) for p in parameters} == {id(p) for p in new.parameters() if p.grad is not None}
    assert all(p.grad.any() for name, p in new.synthesizer.named_parameters() if "to_out.0.bias" in name)
    grads = [block.norm1.weight.grad for block in new.extractor.transformer_blocks()]
    assert all(g.any() for g in grads)  # from the first step on
    assert new.extractor.conv_out.weight.grad is None and new.vae.quant_conv.weight.grad is None
    assert not {p.data_ptr() for p in parameters} & {p.data_ptr() for p in stable.unet.parameters()}  # copies


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_its_definition(prediction):
    model = magic_fixup(prediction)
    batch = training_batch()
    drawn = mfx.draws(batch["target"].shape, torch.Generator().manual_seed(1), drop=0.5)
    assert 0 < drawn["dropped"].sum() < 4
    got = model.loss(batch | drawn)
    parts = [model.loss({k: v[i : i + 2] for k, v in (batch | drawn).items()}) for i in (0, 2)]  # micro-batches
    assert relative_error(sum(parts) / 2, got) < 1e-5
    t, noise = drawn["t"], drawn["noise"]
    x_t = model.schedule.add_noise(batch["target"], noise, t)
    kept = (~drawn["dropped"]).float()[:, None, None, None]
    eps = model(x_t, t, batch["reference"], kept * batch["coarse"], kept * batch["mask"], drawn["reference_noise"])
    want = (eps - noise).square().mean((1, 2, 3))
    if prediction == "v_prediction":  # an error of v, where the edit is known, is 1 / alpha of the noise's
        want = torch.where(drawn["dropped"], want, want / model.schedule.alphas_cumprod[t])
    assert relative_error(want.mean(), got) < 1e-4


def test_coarse_edit_and_mask_are_hidden_together(model):
    batch, other = training_batch(), training_batch(seed=5)
    drawn = mfx.draws(batch["target"].shape, torch.Generator().manual_seed(1))
    for dropped in (True, False):
        given = batch | drawn | {"dropped": torch.full((4,), dropped)}
        want = model.loss(given)
        for name in ("coarse", "mask"):
            assert torch.equal(model.loss(given | {name: other[name]}), want) == dropped
        assert not torch.equal(model.loss(given | {"reference": other["reference"]}), want)
    share = mfx.draws((4000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert 0.18 < share["dropped"].float().mean() < 0.22
    assert share["t"].min() == 0 and share["t"].max() == 999
    assert not mfx.draws((100, 1, 1, 1), drop=0.0)["dropped"].any()


def test_without_cross_reference_attention(tmp_path):
    """The paper's ablation: all that the synthesizer knows of the reference is one vector."""
    stable = without_text()
    ablated = mfx.from_stable_diffusion(stable, image_encoder=small.small_image_encoder())
    assert ablated.extractor is None
    g = torch.Generator().manual_seed(0)
    (one, other, collage), mask = torch.rand(3, 1, 3, 16, 16, generator=g), torch.ones(1, 1, 16, 16)
    (a, coarse, mask), (b, *_) = (ablated.encode_edit(x, collage, mask) for x in (one, other))
    assert a.shape == (1, 1, 5) and torch.equal(a[:, 0], ablated.image_encoder.embed(one))
    got = ablated.sample(a, coarse, mask, steps=3, seeds=(0, 1))
    assert relative_error(ablated.sample(b, coarse, mask, steps=3), got[:1]) > 1e-4
    parameters = ablated.unfreeze()
    ablated.loss(training_batch(batch=1) | {"reference": a}).backward()
    assert {id(p) for p in parameters} == {id(p) for p in ablated.parameters() if p.grad is not None}
    assert not any(p.requires_grad for p in ablated.image_encoder.parameters())
    mfx.save(ablated, tmp_path / "ablated")
    again = mfx.load(tmp_path / "ablated")
    assert again.extractor is None and same_weights(again, ablated)
    assert relative_error(again.sample(a, coarse, mask, steps=3, seeds=(0, 1)), got) <= 1e-5

    # An encoder as wide as the words: Stable Diffusion's own attention to them stays.
    wide = small.small_image_encoder()
    wide.config = replace(wide.config, projection=stable.unet.config.context)
    kept = mfx.from_stable_diffusion(stable, image_encoder=wide).synthesizer.state_dict()
    assert all(torch.equal(kept[n], w) for n, w in stable.unet.state_dict().items() if "attn2" in n)
    with pytest.raises(ValueError, match="an extractor, or else an image encoder"):
        mfx.MagicFixup(ablated.synthesizer, ablated.synthesizer, ablated.vae, ablated.schedule, 16, False,
                       ablated.image_encoder)


def test_the_papers_text_where_the_release_differs(tmp_path):
    """11 features of Stable Diffusion's 16, those below the latents' resolution; nearest mask; nothing dropped."""
    with torch.device("meta"):
        made = [unet.UNet(replace(unet.CONFIGS["sd1"], in_channels=9, context=context)) for context in (None, 0)]
        whole = mfx.MagicFixup(*made, vae.VAE(vae.CONFIGS["sd"]), diffusion.Schedule("linear"), as_paper=True)
    assert len(whole.synthesizer.transformer_blocks()) - len(whole.blind_blocks()) == 11

    stable = without_text(replace(small.TOY, depth=(1,) * len(small.TOY.channels)))
    ours, papers = (mfx.from_stable_diffusion(stable, as_paper=as_paper) for as_paper in (False, True))
    assert 0 < len(papers.blind_blocks()) < len(papers.synthesizer.transformer_blocks())
    for network in (papers.synthesizer, papers.extractor):
        small.randomise(network, seed=4)
    ours.load_state_dict(papers.state_dict())
    outputs = []
    for model in (ours, papers):
        parameters = model.unfreeze()
        outputs.append(model.loss(training_batch(), torch.Generator().manual_seed(0)))
        outputs[-1].backward()
        assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.grad is not None}
    assert not torch.equal(*outputs)
    assert papers.blind_blocks()[0].attn2.to_q.weight.grad is None

    (reference, coarse), mask = torch.rand(2, 1, 3, 64, 64), (torch.rand(1, 1, 64, 64) > 0.5).float()
    mean, nearest = (model.encode_edit(reference, coarse, mask)[2] for model in (ours, papers))
    step = 64 // mean.shape[-1]
    assert torch.equal(nearest, mask[..., ::step, ::step]) and not torch.equal(mean, nearest)
    assert not mfx.draws((100, 1, 1, 1), drop=papers.drop)["dropped"].any() and ours.drop == 0.2
    got = papers.sample(*edit(), steps=2)
    mfx.save(papers, tmp_path / "papers")
    assert relative_error(mfx.load(tmp_path / "papers").sample(*edit(), steps=2), got) <= 1e-5


def test_any_noise_schedule_by_name():
    for name, prediction in (("linear", "epsilon"), ("scaled_linear", "v_prediction"), ("zero_snr", "epsilon")):
        made = mfx.from_stable_diffusion(without_text(), schedule=diffusion.Schedule(name, prediction))
        assert made.schedule.name == name and made.sample(*edit(), steps=2).isfinite().all()
    assert diffusion.Schedule("zero_snr").alphas_cumprod[-1] == 0


# --- Sampling -------------------------------------------------------------------------------------


def test_several_timesteps_in_one_batch(model, monkeypatch):
    reference, coarse, mask = edit(batch=2)
    sampler = samplers.make_sampler("ddim", model.schedule, 10)
    z = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(1))

    def sample(**options):
        denoise = model.denoiser(reference, coarse, mask, **options)
        return count_calls(model.extractor.conv_in, lambda: samplers.run_sampler(denoise, z, sampler))

    one_by_one, want = sample()
    assert one_by_one == [2] * 10  # two edits, ten steps
    together, got = sample(timesteps=sampler.timesteps)
    assert together == [2, 18] and relative_error(got, want) < 1e-5
    step = 2 * 4 * 2 * (3 * 64 * 32 + 4 * 16 * 64)  # keys and values in float32 of 2 edits; blocks of N tokens x width
    for memory, batches in ((3 * step, [2, 6, 6, 6]), (4 * step - 1, [2, 6, 6, 6]), (1, [2] * 10)):
        monkeypatch.setattr(mfx, "MEMORY", memory)
        seen, got = sample(timesteps=sampler.timesteps)
        assert seen == batches and relative_error(got, want) < 1e-5


def test_samplers_that_look_ahead(model, monkeypatch):
    """Heun and PNDM ask for the next timestep, and come back to it."""
    for name in ("heun", "pndm"):
        sampler = samplers.make_sampler(name, model.schedule, 5)
        z = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(1))
        results = []
        for memory in (10**9, 1):
            monkeypatch.setattr(mfx, "MEMORY", memory)
            results.append(samplers.run_sampler(model.denoiser(*edit(), sampler.timesteps), z, sampler))
        assert relative_error(*results) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_one_edit_in_one_batch(model, eta):
    reference, coarse, mask = edit(batch=2)
    seen, got = count_calls(model.extractor.conv_in,
                      lambda: model.sample(reference, coarse, mask, seeds=[3, 1, 4], steps=4, eta=eta))
    assert got.shape == (6, 12, 8, 8) and sum(seen) == 2 * 4  # an extractor pass per edit and step, whatever N
    first = [model.sample(reference[:1], coarse[:1], mask[:1], seeds=[s], steps=4, eta=eta) for s in (3, 1, 4)]
    assert relative_error(got[:3], torch.cat(first)) < 1e-5
    assert torch.equal(first[0], model.sample(reference[:1], coarse[:1], mask[:1], seeds=[3], steps=4, eta=eta))
    assert all(relative_error(got[i], got[j]) > 1e-2 for i in range(6) for j in range(i))


def test_steps_seeds_and_beginnings(model):
    reference, coarse, mask = edit()
    denoise, asked = model.denoiser(reference, coarse, mask), []

    def watched(z, t):
        asked.append((int(t), z))
        return denoise(z, t)

    noise = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = samplers.make_sampler("ddim", model.schedule, 50)
    want = samplers.run_sampler(watched, sampler.noise_to(0, coarse, noise), sampler)
    assert [t for t, _ in asked] == list(range(981, 0, -20))
    assert torch.equal(asked[0][1], model.schedule.add_noise(coarse, noise, 981))  # equation 4
    seen, got = count_calls(model.synthesizer, lambda: model.sample(reference, coarse, mask, eta=0.0))
    assert seen == [1] * 50 and relative_error(got, want) < 1e-5
    want = samplers.run_sampler(denoise, noise, samplers.make_sampler("ddim", model.schedule, 10))
    started, from_noise = (model.sample(*edit(), steps=10, eta=0.0, latent_init=x) for x in (True, False))
    assert relative_error(from_noise, want) < 1e-5 and relative_error(started, want) > 1e-3


def test_in_half_precision(tmp_path, model):
    mfx.save(model, tmp_path / "half", torch.float16)
    half = mfx.load(tmp_path / "half", torch.bfloat16)
    got = half.sample(*edit(), steps=4)
    assert half.synthesizer.conv_in.weight.dtype == torch.bfloat16 and got.dtype == torch.float32
    reference, coarse, mask = edit()
    eps = half(coarse, torch.tensor([500]), reference, coarse, mask, torch.zeros_like(coarse))
    assert eps.dtype == torch.float32 and eps.shape == coarse.shape
    assert relative_error(got, model.sample(*edit(), steps=4)) < 0.1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_under_a_change_map(model, eta):
    """The two papers together: black is Magic Fixup, white is the collage, and between them is what neither has."""
    reference, coarse, mask = edit()
    sampler = samplers.make_sampler("ddim", model.schedule, 8, eta=eta)
    options = dict(noise=torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(5)),
                   step_noise=samplers.make_step_noise((12, 8, 8), [5]))

    def under(change_map):
        denoise = model.denoiser(reference, coarse, mask, sampler.timesteps)
        return diffdiff.differential_diffusion(denoise, coarse, change_map, sampler, **options)

    plain = model.sample(reference, coarse, mask, seeds=[5], steps=8, eta=eta)
    assert torch.equal(under(torch.zeros(8, 8)), plain)
    assert torch.equal(under(torch.ones(8, 8)), coarse)
    halves = torch.zeros(8, 8)
    halves[:, 4:] = 1
    got = under(halves)
    assert torch.equal(got[..., 4:], coarse[..., 4:]) and not torch.equal(got[..., :4], coarse[..., :4])


# --- On disk: whole, of the release, damaged, and not one at all ------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


def test_save_and_load(tmp_path, model):
    mfx.save(model, tmp_path / "saved")
    again = mfx.load(tmp_path / "saved")
    assert (again.size, again.schedule.name) == (16, "scaled_linear")
    assert again.synthesizer.config == model.synthesizer.config and again.extractor.config == model.extractor.config
    assert same_weights(again, model)  # bit for bit; what is computed of weights at other addresses is not
    assert relative_error(again.sample(*edit(), steps=3), model.sample(*edit(), steps=3)) <= 1e-5
    picture = torch.rand(1, 3, 16, 16)
    there, here = (m.decode(m.encode_image(picture)) for m in (again, model))
    assert relative_error(there, here) <= 1e-5
    model.size, before = 32, model.size
    mfx.save(model, tmp_path / "saved")
    model.size = before
    assert mfx.load(tmp_path / "saved").size == 32


def test_a_released_file_saved_anew(tmp_path, released):
    ours = mfx.load(released[1])
    mfx.save(ours, tmp_path / "saved")
    again = mfx.load(tmp_path / "saved")
    assert again.schedule.name == "zero_snr"
    assert same_weights(again, ours)
    assert relative_error(again.sample(*edit(4), steps=3), ours.sample(*edit(4), steps=3)) <= 1e-5


def test_the_schedule_is_the_file_s_own(tmp_path, released):
    tensors = torch.load(released[1], weights_only=True)
    for name in ("scaled_linear", "zero_snr"):
        torch.save(tensors | {"alphas_cumprod": diffusion.Schedule(name).alphas_cumprod.half()}, tmp_path / "own.pt")
        assert mfx.load(tmp_path / "own.pt").schedule.name == name
    torch.save(tensors | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, tmp_path / "own.pt")
    assert_refused(tmp_path / "own.pt", "noise schedule")


def assert_refused(path, *words, error=ValueError):
    with pytest.raises(error) as caught:
        mfx.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_no_magic_fixup(tmp_path, released):
    assert_refused(tmp_path / "nowhere", "no checkpoint", error=FileNotFoundError)
    sd.save(small.stable_diffusion(), tmp_path / "sd")
    assert_refused(tmp_path / "sd", "not a Magic Fixup", "synthesizer/", error=FileNotFoundError)
    torch.save(small.to_original(small.stable_diffusion()), tmp_path / "sd.ckpt")
    assert_refused(tmp_path / "sd.ckpt", "not a whole Magic Fixup", "model.reference_model.")
    (tmp_path / "text.pt").write_text("weights")
    assert_refused(tmp_path / "text.pt", "damaged")

    def write(name, change):
        tensors = torch.load(released[1], weights_only=True)
        change(tensors)
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    query = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn3.to_q.weight"
    assert_refused(write("a.pt", lambda s: s.pop(query)), "missing", "attn2.to_q.weight")
    assert_refused(write("b.pt", lambda s: s.update({"model.reference_model.x": s.pop("betas")})), "unexpected", "x")
    with pytest.warns(UserWarning, match="1 tensors are of no part of the model and left out, e.g. ghost"):
        mfx.load(write("c.pt", lambda s: s.update({"ghost": torch.zeros(1)})))
    assert_refused(write("d.pt", lambda s: s.update({query: torch.zeros(3, 3)})), "misshapen")
    no_vae = write("e.pt", lambda s: [s.pop(k) for k in list(s) if k.startswith("first_stage")])
    assert_refused(no_vae, "first_stage_model.")


def test_folders_that_do_not_fit_together(tmp_path, model):
    folder = tmp_path / "mixed"
    mfx.save(model, folder)
    save_part(unet.UNet(replace(model.extractor.config, heads=8)), folder / "extractor")
    assert_refused(folder, "extractor")
    save_part(without_text().unet, folder / "synthesizer")
    assert_refused(folder, "25 channels in")
    Path(folder / "scheduler" / "scheduler_config.json").unlink()
    assert_refused(folder, "scheduler_config.json", error=FileNotFoundError)
