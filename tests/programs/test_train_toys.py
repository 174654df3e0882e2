"""What the toys are trained on: crops, captions, masks; every stage from end to end, on few and small steps."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import diffusion
import sample
import samplers
import sd
from checkpoints.parts import load_image_encoder
from common.run_state import generator_at, list_states, read_recipe
from reproduce import toy_batches, train_toys
from reproduce.lab import Lab
from tests import small
from tests.training import fails, read_state
from toy import captions, world
from toy.edits import random_instructions
from toy.leaves import dead_leaves


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny Stable Diffusion of 16x16 pictures, its folder."""
    folder = tmp_path_factory.mktemp("plain")
    sd.save(small.stable_diffusion(), folder, torch.float16)
    return folder


def words(init, out, *more):
    return ["inpainting", "--init", str(init), "--out", str(out), "--device", "cpu", "--batch", "2",
            "--scenes", "40", *map(str, more)]


# --- Stages vae and base --------------------------------------------------------------------------


def test_a_mixed_picture_is_one_hour_on_one_side_and_another_on_the_other(monkeypatch):
    scenes = world.random_scenes(6, torch.Generator().manual_seed(0))
    plain = world.render(scenes).image
    image, mixed = toy_batches.render_mixed(scenes, torch.Generator().manual_seed(1))
    assert 0 < mixed.sum() < len(mixed) and torch.equal(image[~mixed], plain[~mixed])
    monkeypatch.setattr(toy_batches, "MIXED", 1.0)
    image, mixed = toy_batches.render_mixed(scenes, torch.Generator().manual_seed(1))
    assert mixed.all()
    off = (image - plain).abs().amax(1)
    kept, changed = ((off < 1e-6).flatten(1).float().mean(1), (off > 0.05).flatten(1).float().mean(1))
    assert (kept > 0.05).all() and (changed > 0.05).float().mean() > 0.5  # an hour may be drawn twice


@pytest.mark.slow
def test_both_stages_end_to_end(tmp_path):
    """Few and small steps, but everything: crops, latents, vocabulary, sheets, the saved folder, and going on."""
    small_run = ["--out", str(tmp_path), "--save-every", "1", "--device", "cpu"]
    shape = ["--widths", "16,24,32", "--latent", "6"]
    train_toys.main(["vae", "--steps", "2", "--batch", "4", *shape, *small_run])
    train_toys.main(["base", "--steps", "1", "--batch", "2", "--scenes", "4", *small_run])
    before = sd.load(tmp_path / "model").unet.conv_out.weight.clone()
    train_toys.main(["base", "--resume", "--steps", "2", *small_run])
    model = sd.load(tmp_path / "model")
    assert not torch.equal(model.unet.conv_out.weight, before)
    stored = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    assert stored["conv_out.weight"].dtype == torch.float16
    assert model.encode_prompt(["a red ball"]).shape == (1, 77, 128)
    assert model.vae.config.scaling_factor != 1
    assert read_recipe(tmp_path, "base", toy_batches.ToyRecipe).scenes == 4  # not said again, not forgotten
    assert (tmp_path / "base-samples.png").exists() and (tmp_path / "vae-loss.png").exists()


@pytest.mark.slow
def test_the_captioner_learns_and_is_saved(tmp_path):
    """Its loss falls, on few and small batches; and its folder is read as the shipped one is."""
    words = ["captioner", "--out", str(tmp_path), "--device", "cpu", "--batch", "8", "--lr", "3e-3", "--warmup", "5"]
    train_toys.main([*words, "--steps", "12"])
    _, losses, validation = read_state(tmp_path, "captioner")
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]) and 0 < validation[0][1] <= 1
    encoder = load_image_encoder(tmp_path / "model", torch.float32)
    assert encoder.embed(torch.zeros(2, 3, 128, 128)).shape == (2, sum(captions.SIZES))


def test_batches_depend_on_the_step_alone():
    recipe = train_toys.RECIPES["vae"]
    first, again, other = (train_toys.vae_batch(recipe, s)[0] for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (recipe.batch, 3, train_toys.CROP, train_toys.CROP)
    whole, weight = train_toys.vae_batch(recipe, recipe.steps - 1)
    assert whole.shape == (recipe.batch // 4, 3, 128, 128) and 0 <= -whole.min() <= 1 and whole.max() <= 1
    assert (weight[: len(whole) // 2] > 1).any() and (weight[len(whole) // 2 :] == 1).all()  # scenes, then leaves
    scenes, recipe = world.random_scenes(8, generator_at(0, 0)), replace(recipe, scenes=8, batch=64)
    index, told, t, noise, _ = train_toys.draws(recipe, scenes, (4, 16, 16), 3)
    assert torch.equal(noise, train_toys.draws(recipe, scenes, (4, 16, 16), 3)[3])
    assert 0 < told.count("") < 32 and len(told) == len(t) == 64 and set(index.tolist()) == set(range(8))
    assert 0.03 < noise.mean((2, 3)).var() < 0.06  # white noise's would be 1 / 256, and the offset adds 0.2 ** 2


@pytest.mark.parametrize("batch", [1, 4])
def test_the_last_steps_of_stage_vae_have_whole_pictures(batch):
    recipe = replace(train_toys.RECIPES["vae"], batch=batch)
    for step, side, n in ((0, train_toys.CROP, 4), (recipe.steps - 1, 128, 2)):
        x, weight = train_toys.vae_batch(recipe, step)
        assert x.shape == (n, 3, side, side) and weight.shape == (n, 1, side, side)


def test_dead_leaves_are_as_varied_as_photographs():
    """In a photograph power falls by about the square of the frequency."""
    x = dead_leaves(24, 64, torch.Generator().manual_seed(0))
    assert torch.equal(x, dead_leaves(24, 64, torch.Generator().manual_seed(0)))
    assert x.shape == (24, 3, 64, 64) and x.min() == 0 and x.max() == 1 and x.std((1, 2, 3)).min() > 0.01
    power = torch.fft.fft2(x.mean(1)).abs().square().mean(0)
    f = torch.fft.fftfreq(64).abs() * 64
    radius = (f[:, None] ** 2 + f**2).sqrt()
    low, high = (power[(radius > r / 1.4) & (radius < r * 1.4)].mean().log2() for r in (3, 24))
    assert 1.5 < (low - high) / 3 < 3.2  # from 3 to 24 waves are three octaves


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_none_for_a_network_that_knows_the_noise(prediction):
    schedule, g = diffusion.Schedule(prediction=prediction), torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 4, 4, generator=g)
    t = torch.tensor([10, 500, 990])
    alpha, sigma = schedule.alpha_sigma(t, z)
    truth = noise if prediction == "epsilon" else alpha * noise - sigma * z
    loss = train_toys.base_loss(lambda z_t, *_: truth, schedule, z, None, t, noise)
    assert loss < 1e-9
    off = train_toys.base_loss(lambda z_t, *_: truth + 1, schedule, z, None, t, noise)
    snr = (alpha / sigma).flatten().double() ** 2
    weight = snr.clamp(max=toy_batches.GAMMA) / snr if prediction == "epsilon" else torch.ones(1)
    torch.testing.assert_close(off.double(), weight.double().mean(), rtol=1e-4, atol=0)


# --- Stage inpainting -----------------------------------------------------------------------------


def test_masks():
    masks = train_toys.random_masks(400, 32, torch.Generator().manual_seed(0))
    assert torch.equal(masks, train_toys.random_masks(400, 32, torch.Generator().manual_seed(0)))
    assert masks.shape == (400, 1, 32, 32) and set(masks.unique().tolist()) == {0, 1}
    share = masks.mean((1, 2, 3))
    assert 0.35 < share.mean() < 0.65 and share.std() > 0.2
    assert ((share == 0) | (share == 1)).float().mean() < 0.05  # there is something to paint, and something to go by
    often = masks.mean((0, 1))
    assert 0.3 < often.min() and often.max() < 0.7  # no place is always the one or the other


@torch.no_grad()
def test_a_widened_unet_is_the_same_until_it_is_trained():
    model = small.stable_diffusion()
    wide = train_toys.widened(model.unet, 5)
    assert (wide.config.in_channels, wide.config.out_channels) == (9, 4)
    g = torch.Generator().manual_seed(0)
    z, one, two = torch.randn(2, 4, 8, 8, generator=g), *torch.randn(2, 2, 5, 8, 8, generator=g)
    t, context = torch.tensor([3, 800]), model.encode_prompt(["a red circle", ""])
    seen = wide(torch.cat([z, one], 1), t, context)
    assert torch.equal(seen, wide(torch.cat([z, two * 100], 1), t, context))
    torch.testing.assert_close(seen, model.unet(z, t, context), rtol=1e-5, atol=1e-5)
    wide.conv_in.weight[:] = 0  # it is a copy
    assert model.unet.conv_in.weight.abs().sum() > 0


def test_training_and_sampling_show_the_network_the_same():
    model, shown = small.stable_diffusion("inpainting"), []
    model.unet.register_forward_pre_hook(lambda _, args: shown.append(args[0][:, 4:]))
    g = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 16, 16, generator=g) * 2 - 1
    pixels = torch.tensor([0, 1, 3, 4])[torch.randint(4, (8, 8), generator=g)]  # of the four under each latent pixel
    repaint = F.pixel_shuffle((torch.arange(4)[:, None, None] < pixels).float()[None], 2)
    taught = model.inpainting_channels(image, repaint)
    assert taught.shape == (1, 5, 8, 8) and torch.equal(taught[0, 0], (pixels > 2).float())
    torch.testing.assert_close(taught[:, 1:], model.encode_image(image * (1 - repaint)))
    sample.edit(model, "cats", image, 1 - repaint, repaint=repaint, steps=2, guidance=1)
    lab = Lab(SimpleNamespace(quick=True, out="."))
    lab.__dict__.update(model=model, inpainting=model)
    lab.inpaint(image, 1 - repaint[0, 0], "cats", steps=2, guidance=1)
    assert len(shown) == 4
    for seen in shown:
        torch.testing.assert_close(seen, taught)


@pytest.mark.slow
def test_a_model_that_follows_instructions_is_made_of_a_plain_one(plain, tmp_path):
    command = words(plain, tmp_path, "--steps", 2)
    train_toys.main(["instruct", *command[1:]])
    model, made = sd.load(tmp_path / "model"), load_file(tmp_path / "pairs.safetensors")
    assert model.unet.config.in_channels == 8 and made["z"].shape == made["seen"].shape == (40, 4, 8, 8)
    assert made["z"].std() / made["seen"].std() == pytest.approx(model.vae.config.scaling_factor, rel=0.1)
    assert cv2.imread(tmp_path / "instruct-samples.png").shape == (3 * 16, 8 * 16, 3)


def test_instructions_say_what_was_changed():
    scenes = world.random_scenes(60, torch.Generator().manual_seed(0))
    edited, orders = random_instructions(scenes, torch.Generator().manual_seed(1))
    for i, order in enumerate(orders):
        changed = [name for name in ("time", "ground", "colour", "kind")
                   if not torch.equal(getattr(scenes, name)[i], getattr(edited, name)[i])]
        (field,), last = changed, order.split()[-1]
        if field == "kind":
            assert edited.kind[i, 0] == -1 and order == f"remove the {colour(scenes, i)} {last}"
        else:
            names = {"time": world.TIMES, "ground": world.GROUNDS, "colour": world.COLOURS}[field]
            value = getattr(edited, field)[i]
            assert last == names[value[0] if field == "colour" else value]
            assert order.split()[0] == {"time": "make", "ground": "turn", "colour": "paint"}[field]


def colour(scenes, i):
    return world.COLOURS[scenes.colour[i, 0]]


def test_inpainting_resumes_to_the_same_weights_and_leaves_the_rest_alone(plain, tmp_path, monkeypatch, capsys):
    make = samplers.make_sampler
    monkeypatch.setattr(samplers, "make_sampler", lambda name, schedule, k: make(name, schedule, 2))  # of the sheets
    unbroken, broken = (words(plain, tmp_path / name, "--steps", 2, "--save-every", 1) for name in "ab")
    train_toys.main(unbroken)

    def stops(seed, step):
        if (seed, step) == (1, 1):
            raise KeyboardInterrupt
        return generator_at(seed, step)

    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(toy_batches, "generator_at", stops)
        train_toys.main(broken)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == ("python -m reproduce.train_toys: interrupted: the state after step 1 is saved; "
                    f"python -m reproduce.train_toys inpainting --out {tmp_path / 'b'} --resume goes on")
    train_toys.main(["inpainting", "--out", str(tmp_path / "b"), "--resume", "--device", "cpu"])
    a, b = (load_file(tmp_path / name / "inpainting-state-0000002.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not any(k.startswith("model.text") for k in a) and a["model.conv_in.weight"][:, 4:].abs().sum() > 0

    def contents(folder):
        return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    before, one, two = (contents(folder) for folder in (plain, tmp_path / "a/model", tmp_path / "b/model"))
    assert one == two and before.keys() == one.keys()
    changed = {str(name) for name in one if one[name] != before[name]}
    assert changed == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert sd.load(tmp_path / "a/model").unet.config.in_channels == 9
    assert cv2.imread(tmp_path / "a/inpainting-samples.png").shape == (3 * 16, 8 * 16, 3)
    masked = load_file(tmp_path / "a/masked.safetensors")
    assert masked["z"].shape == (40, 4, 8, 8) and masked["known"].shape == (40, 5, 8, 8)
    assert set(masked["known"][:, 0].unique().tolist()) == {0, 1} and masked["known"].isfinite().all()

    for words_, what in (
        (["--seed", 1], "--seed"), (["--batch", 3], "--batch"), (["--scenes", 41], "--scenes 41"),
        (["--offset", 0], "--offset"), (["--widths", "8,16"], "--widths 8,16"), (["--latent", 3], "--latent"),
        (["--init", tmp_path / "a/model"], "--init"),
    ):
        said = fails(train_toys.main, ["inpainting", "--out", tmp_path / "b", "--resume", *words_], capsys)
        assert f"--resume cannot change {what}" in said
    for state in list_states(tmp_path / "b", "inpainting"):
        state.unlink()
    again = fails(train_toys.main, words(plain, tmp_path / "b"), capsys)
    assert "model/unet is there already, and would be written over" in again

    already = tmp_path / "a/model"
    for stage in ("inpainting", "base"):
        said = fails(train_toys.main, [stage, "--init", already, "--out", tmp_path / "c"], capsys)
        assert "is an inpainting model already" in said


def test_a_quarter_of_the_masks_cover_everything(plain, tmp_path, monkeypatch):
    shown = []

    monkeypatch.setattr(train_toys, "base_loss", lambda *given: shown.append(given[-1]))
    monkeypatch.setattr(train_toys.train, "fit", lambda stage, model, loss, *_: loss(0, None) or model)
    train_toys.main(words(plain, tmp_path, "--steps", 1, "--batch", 200))
    model = sd.load(plain, torch.float32)
    nothing = model.inpainting_channels(torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16))
    whole = (shown[0] == nothing).flatten(1).all(1)
    assert 0.15 < whole.float().mean() < 0.35
    assert (shown[0][~whole, 0].mean((1, 2)) < 1).float().mean() > 0.9


def test_mistakes_get_one_line(plain, tmp_path, capsys):
    model = small.stable_diffusion()
    model.tokenizer = None
    sd.save(model, tmp_path / "mute")
    out = tmp_path / "out"
    for argv, what in (
        (words(tmp_path / "nowhere", out), "no checkpoint"),
        (words(plain, out, "--scenes", 0), "--scenes"),
        (["base", "--out", out], "first python -m reproduce.train_toys vae"),
        (["vae", "--scenes", 5, "--out", out], "--scenes and --offset are not for vae"),
        (["if-2", "--out", out], "first python -m reproduce.train_toys if-1"),
        (["if-2", "--init", plain, "--out", out], "--init is not for if-2"),
        (words(plain, out, "--resume"), "nothing to resume"),
        (words(tmp_path / "mute", out), "tokenizer"),
        (["base", "--init", tmp_path / "mute", "--out", out], "tokenizer"),
    ):
        assert what in fails(train_toys.main, argv, capsys)
    assert not out.exists() or not list(out.iterdir())
