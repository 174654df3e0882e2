"""Stage mfx: resume after kill -9, many processes, gradient checkpointing, the paper's recipe, shards, mistakes."""

import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import weakref
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clip
import diffusion
import loop
import mfx
import pairs
import sd
import train
import unet
import vae
from common.files import write_json
from tests import small

ROOT = Path(train.__file__).parent
UNET = unet.UNetConfig(channels=(16, 32), layers=1, depth=(1, 1), heads=2, context=32, groups=8)
GIB = 2**30


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A tiny Stable Diffusion of 16x16 pictures."""
    folder = tmp_path_factory.mktemp("stable")
    write_stable(folder)
    return folder


def write_stable(folder):
    torch.manual_seed(0)
    text = clip.TextEncoder(replace(clip.CONFIGS["toy"], vocab_size=20, width=32, layers=1, heads=2))
    autoencoder = vae.VAE(vae.VAEConfig((8, 8), 1, 4, groups=4))
    sd.save_part(small.randomise(unet.UNet(UNET)), folder / "unet", sample_size=8)
    sd.save_part(small.randomise(autoencoder), folder / "vae")
    sd.save_part(text, folder / "text_encoder")
    write_json(folder / "scheduler/scheduler_config.json",
                       sd.schedule_to_json(diffusion.Schedule()))


def words(stable, out, *more):
    return ["--stage", "mfx", "--init", str(stable), "--out", str(out), "--device", "cpu", "--held-out", "2",
            "--scenes", "8", "--batch", "4", *map(str, more)]


def state(out):
    """-> tensors, losses, validation losses"""
    path, told = loop.newest(out, "mfx")
    return load_file(path), told["losses"], told["validation"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def python(*argv, check=True):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, *map(str, argv)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Resume, and many processes


def test_killed_at_step_11_and_resumed_it_ends_as_if_nothing_had_been(stable, tmp_path):
    unbroken, killed = (words(stable, tmp_path / name, "--steps", 20, "--save-every", 5) for name in "ab")
    train.main(unbroken)
    code = f"""
        import os, train
        at = train.at
        train.at = lambda seed, step: os.kill(os.getpid(), 9) if (seed, step) == (1, 11) else at(seed, step)
        train.main({killed!r})
    """
    assert python("-c", textwrap.dedent(code), check=False).returncode == -9
    assert len(state(tmp_path / "b")[1]) == 10  # 11 steps were made, and 10 of them saved
    train.main(["--stage", "mfx", "--out", str(tmp_path / "b"), "--resume", "--device", "cpu"])
    (a, *curves), (b, *others) = state(tmp_path / "a"), state(tmp_path / "b")
    assert len(curves[0]) == 20 and curves == others and same(a, b)
    for part in ("synthesizer", "extractor"):
        file = f"model/{part}/diffusion_pytorch_model.safetensors"
        assert same(load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file))


def test_two_processes_compute_what_one_does(stable, tmp_path):
    """At the same global batch, one of them with two micro-batches to each; pairs rendered as they come."""
    common = ["--steps", 4, "--save-every", 2, "--scenes", 0, "--lr", 1e-3]
    train.main(words(stable, tmp_path / "one", *common))
    python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py",
           *words(stable, tmp_path / "two", *common, "--micro-batch", 1))
    (a, *one), (b, *two) = state(tmp_path / "one"), state(tmp_path / "two")
    assert np.allclose(one[0], two[0], rtol=1e-5, atol=0)  # the losses of every step
    assert np.allclose(one[1], two[1], rtol=1e-4, atol=0)  # of held-out pairs
    assert max((a[k] - b[k]).abs().max().item() for k in a if k.startswith("m.")) < 1e-4
    assert (tmp_path / "two/model/synthesizer/config.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The paper's recipe


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors but the model's weights, as they come and go."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.known:
                size = t.untyped_storage().nbytes()
                self.known[key] = weakref.ref(t.untyped_storage(), lambda _, key=key, size=size: self.gone(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        del self.known[key]
        self.now -= size


def magic(stable):
    model = mfx.from_stable_diffusion(sd.load(stable))
    for network in (model.synthesizer, model.extractor):
        small.randomise(network, seed=4)
    return model.float()


def batch_of(n, side, C=4, device="cpu"):
    g = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(n, C, side, side, generator=g) for name in ("reference", "target", "coarse")}
    return batch | {"mask": torch.ones(n, 1, side, side)} | mfx.draws(batch["target"].shape, g)


def test_checkpointing_changes_memory_and_not_gradients(stable):
    """Not a bit of them, of one model: the same weights at the same addresses."""
    gradients, peaks, model = [], [], magic(stable)
    parameters = model.unfreeze()
    for checkpointed in (False, True):
        if checkpointed:
            loop.checkpointing(model)
            for p in parameters:
                p.grad = None
        with Live(model) as live:
            loss = model.loss(batch_of(2, 16))
            held = live.now  # between the passes: what the backward pass will want
            loss.backward()
        peaks.append((held, live.peak))
        gradients.append([p.grad for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert peaks[1][0] < 0.6 * peaks[0][0] and peaks[1][1] < 0.8 * peaks[0][1], peaks


def test_the_memory_that_the_docstring_of_train_counts():
    """At full size, on tensors that have shapes only: 40 GB are enough for the preset, and 23 GiB for one step here."""
    schedule, batches = diffusion.Schedule(), [batch_of(n, 64) for n in (4, 1)]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, sd.Bare():
        synthesizer, extractor = (unet.UNet(replace(unet.CONFIGS["sd1"], in_channels=9, context=c)) for c in (None, 0))
        model = mfx.MagicFixup(synthesizer, extractor, vae.VAE(vae.CONFIGS["sd"]), schedule)
    parameters = model.unfreeze()
    weights = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("vae.")) / GIB
    moments = 2 * sum(p.nbytes for p in parameters) / GIB
    frozen = sum(p.nbytes for p in model.vae.parameters()) / GIB
    loop.checkpointing(model)

    def peak(batch):
        with fake, Live(model) as live:
            loss = model.loss({name: fake.from_tensor(t) for name, t in batch.items()})
            forward = live.peak
            loss.backward()
        return forward / GIB, live.peak / GIB

    forward, _ = peak(batches[0])  # in fp32; half precision, for most of it, takes less
    assert weights + moments + moments / 2 + frozen + forward < 31
    for p in parameters:  # gradients that are dropped as soon as they are there, as in loop.fit
        p.grad = None
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    _, all_of_it = peak(batches[1])
    assert weights + moments + frozen + all_of_it < 20.5
    told = dict(weights=weights, moments=moments, frozen=frozen, forward=forward, all_of_it=all_of_it)
    assert {k: round(v, 1) for k, v in told.items()} == dict(
        weights=6.3, moments=12.5, frozen=0.3, forward=4.8, all_of_it=1.2
    )


def test_steps_within_the_backward_pass_and_micro_batches_change_nothing(stable, tmp_path):
    """The preset's three ways to the same weights: each parameter at once, all after a pass, all after four passes."""
    common = ["--preset", "a100", "--steps", 3, "--warmup", 1, "--lr", 1e-3, "--scenes", 0]
    for name, more in (("a", ["--micro-batch", 4]), ("b", ["--no-checkpointing"]), ("c", ["--micro-batch", 1])):
        train.main(words(stable, tmp_path / name, *common, *more))
    (a, one, _), (b, two, _), (c, three, _) = (state(tmp_path / name) for name in "abc")
    assert same(a, b) and one == two  # checkpointing or not
    assert np.allclose(one, three, rtol=1e-5)
    assert max((a[k] - c[k]).abs().max().item() for k in a if k.startswith("m.")) < 1e-4
    assert not any(k.startswith("average.") for k in a)

    at_once, together = magic(stable), magic(stable)  # with a norm to clip to that no gradient has
    recipe = replace(train.RECIPES["a100"]["mfx"], steps=3, batch=4, warmup=1, lr=1e-3)
    for model, clip_at in ((at_once, None), (together, 1e9)):
        model.unfreeze()

        def loss(step, part, model=model):
            return model.loss(batch_of(4, 8), train.at(0, step))

        loop.fit("mfx", model, loss, None, replace(recipe, clip=clip_at), tmp_path / str(clip_at), False)
    assert same(dict(at_once.named_parameters()), dict(together.named_parameters()))
    assert all(p.grad is None for p in at_once.parameters())


def test_the_recipe_is_the_papers():
    recipe = train.RECIPES["a100"]["mfx"]
    assert (recipe.steps, recipe.batch, recipe.lr, recipe.warmup) == (120_000, 32, 1e-5, 10_000)
    assert (recipe.weight_decay, recipe.clip, recipe.cosine, recipe.ema, recipe.motion) == (0, None, False, 0, "both")
    dropped = mfx.draws((100_000, 1, 1, 1), torch.Generator().manual_seed(0))["dropped"].float().mean()
    assert abs(dropped - 0.2) < 0.005


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def write_shards(folder, shards=3, each=4):
    folder.mkdir()
    for s in range(shards):
        made = pairs.toy_pairs(each, torch.Generator().manual_seed(s), size=16)
        with tarfile.open(folder / f"pairs-{s:06d}.tar", "w") as tar:
            for i in range(each):
                def picture(name, i=i, made=made):
                    return (made[name][i].permute(1, 2, 0).numpy()[..., ::-1] * 127.5 + 127.5).round().astype(np.uint8)

                alpha = (made["mask"][i, 0].numpy()[..., None] * 255).astype(np.uint8)
                warped = np.concatenate([picture("coarse"), alpha], 2)
                for extension, content in (("ref.jpg", picture("reference")), ("gt.jpg", picture("target")),
                                           ("flow.png", warped), ("affine.png", warped)):
                    data = cv2.imencode(f".{extension[-3:]}", content)[1].tobytes()
                    member = tarfile.TarInfo(f"{s * each + i:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"pairs-{s:06d}.json").write_text(json.dumps({"kept": each}))
    return folder


@pytest.mark.parametrize("micro", [2, 4])  # 4: every parameter at once
def test_shards_are_resumed_where_they_were_left(stable, tmp_path, micro):
    folder = write_shards(tmp_path / "pairs")
    common = ["--preset", "a100", "--data", folder, "--warmup", 1, "--lr", 1e-3, "--micro-batch", micro]
    common += ["--scenes", 0]
    train.main(words(stable, tmp_path / "a", *common, "--steps", 4))
    train.main(words(stable, tmp_path / "b", *common, "--steps", 2))
    train.main(["--stage", "mfx", "--out", str(tmp_path / "b"), "--resume", "--steps", "4", "--device", "cpu"])
    (a, losses, validation), (b, others, _) = state(tmp_path / "a"), state(tmp_path / "b")
    assert losses == others and same(a, b) and len(set(losses)) == 4
    assert [step for step, _ in validation] == [4]
    assert cv2.imread(tmp_path / "a/mfx-samples.png").shape == (4 * 16, 2 * 16, 3)
    train.main(words(stable, tmp_path / "c", *common, "--steps", 1, "--scenes", 8))  # encoded once, and kept
    assert load_file(tmp_path / "c/pairs.safetensors")["mask"].shape == (32, 1, 8, 8)


def test_held_out_shards_are_not_trained_on(tmp_path):
    recipe = replace(train.RECIPES["a100"]["mfx"], data=str(write_shards(tmp_path / "pairs")), held_out=64)
    taught, held = (train.shards(recipe, held_out=h) for h in (False, True))
    assert {p for p, _ in taught.shards}.isdisjoint(p for p, _ in held.shards)
    assert (taught.pairs, held.pairs, len(train.held_out_pairs(recipe, 16)["mask"])) == (8, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Ablations, and mistakes


def test_without_cross_reference_there_is_no_extractor(stable, tmp_path):
    train.main(words(stable, tmp_path, "--steps", 1, "--no-cross-reference", "--motion", "flow", "--held-out", 0))
    assert mfx.load(tmp_path / "model").extractor is None
    assert not (tmp_path / "mfx-samples.png").exists() and (tmp_path / "mfx-loss.png").exists()


def one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    return [line for line in said if "error" in line][-1]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(stable, tmp_path, capsys, monkeypatch):
    loss = mfx.MagicFixup.loss
    monkeypatch.setattr(mfx.MagicFixup, "loss", lambda self, *batch: loss(self, *batch) * float("nan"))
    for preset in ("toy", "a100"):
        said = one_line(words(stable, tmp_path, "--preset", preset, "--steps", 2, "--held-out", 0), capsys)
        assert "not finite at step 0: resume with a lower --lr" in said
    assert not loop.states(tmp_path, "mfx")


def test_mistakes_get_one_line(stable, tmp_path, capsys):
    mfx.save(magic(stable), tmp_path / "magic")
    (tmp_path / "empty").mkdir()
    write_shards(tmp_path / "single", shards=1)
    out = tmp_path / "out"
    for argv, what in (
        (["--stage", "mfx", "--preset", "a100", "--out", str(out)], "--init"),
        (words(stable, out, "--data", tmp_path / "nowhere"), "no finished shards"),
        (words(stable, out, "--data", tmp_path / "empty"), "no finished shards"),
        (words(stable, out, "--data", tmp_path / "single"), "--held-out 0"),
        (words(stable, out, "--micro-batch", 3), "micro-batches of 3"),
        (words(tmp_path / "nowhere", out), "no checkpoint"),
        (words(tmp_path / "magic", out), "not a Stable Diffusion"),
        (words(stable, out, "--resume"), "nothing to resume"),
    ):
        assert what in one_line(argv, capsys)
