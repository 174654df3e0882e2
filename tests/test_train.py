"""train.py: the loop on a tiny autoencoder, the recipes, Magic Fixup's gradients and memory."""

import math
import signal
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import cv2
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import diffusion
import mfx
import train
import unet
import vae
from common.interrupts import interrupt
from common.run_state import list_states
from kernels.blocks import checkpoint_blocks
from kernels.muon import Muon, make_optimizers, orthogonalize
from reproduce.dd_tables import peak_memory
from tests.training import equal, random_batch, random_fixup, read_state, tiny_vae, write_stable

RECIPE = train.Recipe(steps=12, batch=2, lr=5e-3, warmup=3, ema=0.9, save_every=4)
GIB = 2**30


def loss_of(model):
    def loss(step, part):
        x = torch.rand(2, 3, 1, 1, generator=train.generator_at(0, step)) * 2 - 1
        mean, _ = model.encode(x.expand(2, 3, 8, 8))
        return (model.decode(mean) - x).square().mean()

    return loss


def run(model, out, resume=False, loss=None, recipe=RECIPE):
    out.mkdir(exist_ok=True)
    sheet = torch.zeros(1, 8, 3, 8, 8)
    return train.fit("tiny", model, loss or loss_of(model), lambda average: sheet, recipe, out, resume)


# --- The loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, muon", [(0, False), (5, True), (7, False), (11, True)])
def test_an_interrupt_saves_the_step_that_runs(step, muon, tmp_path):
    """Within any step: then nothing is lost, and the resumed run ends where an unbroken one does, bit for bit."""
    a, b, c = (tiny_vae(seed, width=12) for seed in (0, 0, 1))  # c's own start is forgotten
    seen = []

    def interrupted(network, at):
        loss = loss_of(network)

        def call(step, part):
            if step == at:
                interrupt(signal.SIGTERM, None)
            return loss(step, part)

        return call

    def fit(model, out, loss=None, resume=False):
        out.mkdir(exist_ok=True)
        validate = lambda average: seen.append(1) or average.decoder.conv_out.weight.sum()  # noqa: E731
        sheet = lambda average: torch.zeros(1, 8, 3, 8, 8)  # noqa: E731
        recipe = replace(RECIPE, muon=muon)
        return train.fit("tiny", model, loss or loss_of(model), sheet, recipe, out, resume, validate)

    fit(a, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(b, tmp_path / "b", interrupted(b, step))
    assert stop.value.args == (signal.SIGTERM,)
    saved = list_states(tmp_path / "b", "tiny")[-1]
    assert saved.name == f"tiny-state-{step + 1:07d}.safetensors"
    fit(c, tmp_path / "b", resume=True)
    (whole, *curves), (pieces, *others) = (read_state(tmp_path / d, "tiny") for d in "ab")
    assert equal(whole, pieces) and curves == others
    assert [n for n, _ in curves[1]] == [4, 8, 12] and len(seen) == 6  # validated as often as planned


def test_a_muon_step_is_as_large_in_every_direction():
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(12, 4, 3, 3).to(memory_format=torch.channels_last))
    strong, weak = torch.randn(2, 12, 1, 1, 1, generator=g), torch.randn(2, 1, 4, 3, 3, generator=g)
    p.grad = 100 * strong[0] * weak[0] + strong[1] * weak[1]
    Muon([p], lr=1.0).step()
    values = torch.linalg.svdvals(p.detach().reshape(12, 36)) / (0.2 * 36**0.5)
    assert 0.6 < values[1] and values[0] < 1.3 and values[2] < 0.1  # two directions, a hundred times apart
    assert (p * p.grad).sum() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_makes_matrices_orthogonal_in_either_precision(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 20, generator=g) * torch.logspace(-1, 1, 20)
    values = torch.linalg.svdvals(orthogonalize(x, dtype).float())
    assert 0.6 < values.min() and values.max() < 1.3 and torch.linalg.svdvals(x).min() < 1


def test_muon_gets_matrices_and_adam_the_rest(tmp_path):
    parameters = dict(tiny_vae(width=12).named_parameters(), **{"token_embedding.weight": torch.zeros(50, 12)})
    adam, muon = make_optimizers(replace(RECIPE, muon=True), parameters)
    shapes = {tuple(p.shape) for group in muon.param_groups for p in group["params"]}
    assert (12, 12, 3, 3) in shapes and (12, 12) in shapes
    assert not shapes & {(50, 12), (12,), (3, 12, 3, 3)}
    both = [p for o in (adam, muon) for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in both} == {id(p) for p in parameters.values()} and len(both) == len(parameters)


def test_training_learns_and_draws(tmp_path):
    model = tiny_vae()

    def mean_loss(network):
        return torch.stack([loss_of(network)(s, None) for s in range(100, 110)]).mean().item()

    before = mean_loss(model)
    assert mean_loss(run(model, tmp_path)) < before
    assert cv2.imread(tmp_path / "tiny-samples.png").shape == (8, 64, 3)
    assert cv2.imread(tmp_path / "tiny-loss.png").std() > 0
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_the_rate_and_the_average(tmp_path):
    """Warm-up and half a cosine; and an average that forgets its first steps sooner than its last."""
    model, start, rates = tiny_vae(), tiny_vae(), []
    real = torch.optim.AdamW.step

    def step(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args)

    with mock.patch.object(torch.optim.AdamW, "step", step):
        run(model, tmp_path / "all")
    want = [RECIPE.lr * min(1, (i + 1) / 3) * (0.5 + 0.5 * math.cos(math.pi * i / 12)) for i in range(12)]
    assert rates == pytest.approx(want)
    once = tiny_vae()
    average = run(once, tmp_path / "once", recipe=replace(RECIPE, steps=1))
    for first, last, mean in zip(start.parameters(), once.parameters(), average.parameters()):
        torch.testing.assert_close(mean, torch.lerp(first, last, 1 - 1 / 10))


def test_one_timestep_from_each_part():
    assert diffusion.draw_timesteps(32, train.generator_at(16, 48_502)).max() == 999  # 32 parts, and 31.9999999
    t = diffusion.draw_timesteps(8, torch.Generator().manual_seed(0))
    assert (t // 125).tolist() == list(range(8)) and t.dtype == torch.long


# --- Recipes --------------------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    recipe = train.RECIPES["paper"]
    assert (recipe.steps, recipe.batch, recipe.lr, recipe.warmup) == (120_000, 32, 1e-5, 10_000)
    assert (recipe.weight_decay, recipe.clip, recipe.cosine, recipe.ema, recipe.motion) == (0, None, False, 0, "both")
    dropped = mfx.draws((100_000, 1, 1, 1), torch.Generator().manual_seed(0))["dropped"].float().mean()
    assert abs(dropped - 0.2) < 0.005


def test_the_size_of_the_weights_chooses_the_recipe(monkeypatch):
    def recipe(width):
        wide = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(channels=(width, 1280))))
        monkeypatch.setattr(train.sd, "load", lambda path: wide)
        return train.choose_recipe("some.ckpt")

    assert recipe(320) == replace(train.RECIPES["paper"], init="some.ckpt")
    assert recipe(64) == replace(train.RECIPES["toy"], init="some.ckpt")
    assert train.choose_recipe(None) == train.RECIPES["toy"]


def test_the_micro_batch_fits_into_the_memory(monkeypatch):
    assert train.fit_micro_batch(32, torch.device("cpu")) == 1
    for GiB, most in ((24, 1), (40, 8), (80, 32)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=GiB * GIB: (free, free))
        assert train.fit_micro_batch(32, torch.device("cuda")) == most


# --- Gradients and memory of Magic Fixup ----------------------------------------------------------


def test_checkpointing_changes_memory_and_not_gradients(tmp_path):
    """Not a bit of them, of one model: the same weights at the same addresses."""
    model = random_fixup(write_stable(tmp_path))
    gradients, peaks, parameters = [], [], model.unfreeze()
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_blocks(model, train.BLOCKS)
            for p in parameters:
                p.grad = None
        peaks.append(peak_memory(lambda: model.loss(random_batch(2, 16)).backward()))
        gradients.append([p.grad for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert peaks[1] < 0.8 * peaks[0], peaks


def test_micro_batches_change_nothing(tmp_path):
    """Adam's first moments, the gradients so far, agree; and without `ema` no average is saved. At a small rate: Adam
    makes a step of a whole rate out of a gradient that is nothing but rounding."""
    stable = write_stable(tmp_path / "stable")
    recipe = replace(train.RECIPES["paper"], steps=3, batch=4, warmup=1, lr=1e-5, precision="fp32")
    for name, micro_batch, checkpointing in (("a", 4, True), ("b", 4, False), ("c", 1, True)):
        model = random_fixup(stable)
        model.unfreeze()
        batch = random_batch(4, 8)

        def loss(step, part, model=model, batch=batch):
            return model.loss({key: x[part] for key, x in batch.items()})

        (tmp_path / name).mkdir()
        how = replace(recipe, micro_batch=micro_batch, checkpointing=checkpointing)
        train.fit("mfx", model, loss, None, how, tmp_path / name, False)
    (a, one, _), (b, two, _), (c, three, _) = (read_state(tmp_path / name) for name in "abc")
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
    torch.testing.assert_close(one, three, rtol=1e-5, atol=0)
    for name in a:
        if name.startswith("m."):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
            torch.testing.assert_close(a[name], c[name], rtol=0, atol=1e-4)
    assert not any(name.startswith("average.") for name in a)


@pytest.mark.slow
def test_the_memory_that_fit_micro_batch_counts():
    """At full size, on tensors that have shapes only: a card of 40 GB holds micro-batches of 8."""
    schedule = diffusion.Schedule()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        config = replace(unet.CONFIGS["sd1"], in_channels=9)
        synthesizer, extractor = (unet.UNet(replace(config, context=context)) for context in (None, 0))
        model = mfx.MagicFixup(synthesizer, extractor, vae.VAE(vae.CONFIGS["sd"]), schedule)
    parameters = model.unfreeze()
    weights = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("vae.")) / GIB
    moments = 2 * sum(p.nbytes for p in parameters) / GIB
    frozen = sum(p.nbytes for p in model.vae.parameters()) / GIB
    checkpoint_blocks(model, train.BLOCKS)
    peaks = []
    for n in (1, 4):
        batch = random_batch(n, 64)
        with fake:
            given = {name: fake.from_tensor(t) for name, t in batch.items()}
            peaks.append(peak_memory(lambda given=given: model.loss(given)) / GIB)
    counted = dict(weights=weights, moments=moments, gradients=moments / 2, frozen=frozen, each=peaks[1] / 4)
    assert {name: round(GiB, 1) for name, GiB in counted.items()} == dict(
        weights=6.3, moments=12.5, gradients=6.3, frozen=0.3, each=1.2
    )
    assert peaks[0] < 1.25
