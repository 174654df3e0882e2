"""Magic Fixup: a collage of pieces of a photograph -> a photograph. Alzayer et al. 2024, arXiv 2403.13044.

Two UNets, both begun as Stable Diffusion without its text. The *detail extractor* sees the untouched reference, the
*synthesizer* denoises the edit, and every transformer block of the synthesizer looks up in the same block of the
extractor what the things in the picture are made of.

    I         reference     (B, C, h, w)   the photograph before the edit, encoded
    I_coarse  coarse        (B, C, h, w)   the collage, its holes inpainted by a simple algorithm, encoded
    M         mask          (B, 1, h, w)   1 = content survived the edit, 0 = hole; a mean over a latent's pixels at the
                                           rim, where the paper takes the nearest and the release interpolates

    model = from_stable_diffusion(sd.load("weights/toy"))
    optimizer = torch.optim.Adam(model.unfreeze(), lr=1e-5)
    model.loss({"reference": .., "target": .., "coarse": .., "mask": ..}).backward()

    model = load("weights/toy-mfx")                                                  or the released weights' file
    x_0 = model.sample(reference, coarse, mask, seeds=range(5))                      five versions of one edit
    denoise = model.denoiser(reference, coarse, mask, sampler.timesteps)
    x_0 = diffdiff.differential_diffusion(denoise, coarse, change_map, sampler)      the two papers together

Equation numbers are the paper's. Where the released program does otherwise than the paper says, the line says so.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import diffusion
from checkpoints.names import IGNORED, translate
from checkpoints.read import read_tensors, uncollected
from common.files import read_json, write_json
from diffusion import BETAS, Schedule, T
from sd import StableDiffusion, build, latent_side, load_part, save_part, schedule_from_json, schedule_to_json

# ---------------------------------------------------------------------------------------------------------------------
# The model


class MagicFixup(nn.Module):
    """Both UNets, the autoencoder that they work behind, and the noise schedule.

    synthesizer  UNet: 2C + 1 channels in, C out, a second attention to features of its own widths (context=None)
    extractor    UNet: 2C + 1 channels in, no second attention (context=0).  None for an ablation: then the synthesizer
                 has no second attention either, and never sees the reference. (The paper's keeps an attention to the
                 reference as CLIP sees it, in a single vector)
    size         pixels along a side of the square pictures that it is for
    ValueError if the parts do not fit together.
    """

    def __init__(self, synthesizer, extractor, vae, schedule, size=512):
        super().__init__()
        self.synthesizer, self.extractor, self.vae = synthesizer, extractor, vae
        self.schedule, self.size = schedule, size
        s, C = synthesizer.config, vae.config.latent_channels
        if (s.in_channels, s.out_channels) != (2 * C + 1, C):
            raise ValueError(f"a synthesizer for {C} latent channels has {2 * C + 1} channels in and {C} out, this one "
                             f"has {s.in_channels} and {s.out_channels}")
        if s.context != (None if extractor else 0):
            raise ValueError("a synthesizer attends to an extractor's features, or has no second attention and no "
                             "extractor")
        if extractor and extractor.config != replace(s, context=0):
            raise ValueError("the extractor is not built as the synthesizer is")

    encode_image, decode = StableDiffusion.encode_image, StableDiffusion.decode  # of them, they need the .vae alone

    def details(self, reference, mask, t, noise):
        """What the synthesizer reads of the reference at t (B,): a block's (keys, values), (B, heads, N, d) each.

        They do not depend on the edit's own latent, so they can be made ahead, and serve any number of samples.
        """
        if self.extractor is None:
            return ()
        I_t = self.schedule.add_noise(reference, noise, t)  # eq. 2, whose (1 - abar) lacks its square root in print
        z = torch.cat([I_t, reference, mask], dim=1)  # (B, 2C + 1, h, w)
        # Eq. 3: [(B, N, width)] of all blocks, 16 in Stable Diffusion. (The paper has n = 11; the release takes all.)
        F_t = self.extractor.features(z.to(self.extractor.conv_in.weight.dtype), t)
        return self.synthesizer.keys_values(F_t)  # figure 3, right: K and V of f_t, Q will be of g_t

    def forward(self, x_t, t, reference, coarse, mask, noise):
        """The predicted noise of x_t.

        x_t, reference, coarse  (B, C, h, w), latents; x_t noised to t
        t                       (B,) in 0 .. 999
        mask                    (B, 1, h, w), 1 = kept
        noise                   (B, C, h, w), the reference's (equation 2); x_t has one of its own
          ->                    (B, C, h, w)
        """
        output = self.predict(x_t, t, reference, coarse, mask, noise)
        return self.schedule.x0_eps(output.to(x_t.dtype), x_t, t)[1]

    def predict(self, x_t, t, reference, coarse, mask, noise):
        """As `forward`, but what the network says itself: the noise, or v where the schedule's prediction is v."""
        z = torch.cat([x_t, coarse, mask], dim=1).to(self.synthesizer.conv_in.weight.dtype)  # (B, 2C + 1, h, w)
        return self.synthesizer(z, t, self.details(reference, mask, t, noise))

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def unfreeze(self):
        """Make trainable what the loss depends on, and return it: a list of parameters for the optimizer.

        Both UNets, but for what the extractor would compute after its last feature; never the autoencoder.
        """
        self.vae.requires_grad_(False)
        self.synthesizer.requires_grad_(True)
        if self.extractor:
            named = dict(self.extractor.named_parameters())  # what runs after the last norm1 comes after it here, too
            last = max(i for i, name in enumerate(named) if re.search(r"transformer_blocks\.\d+\.norm1\.", name))
            for i, p in enumerate(named.values()):
                p.requires_grad_(i <= last)
        return [p for p in self.parameters() if p.requires_grad]

    def loss(self, batch, generator=None):
        """The mean squared error of what is predicted, a scalar. The noise, as for Stable Diffusion and in the release.

        batch      latents "reference", "target", "coarse" (B, C, h, w) and "mask" (B, 1, h, w). It may hold any of
                   `draws`' entries as well, to be used instead of fresh ones
        generator  of all that is random here, on the CPU

        Or v = alpha noise - sigma x_0, where the model has v-prediction (Salimans & Ho 2022; Stable Diffusion 2.1).
        With the coarse edit at hand the picture is nearly known even at t = 981. There an error of the noise is 13
        times as large in the picture, so that the noise has to be known to a percent, while v all but is the picture.
        A toy's picture there was off by 0.05 (squared, in latents) after 500 steps of v, by 0.14 after 7,000 of noise.
        """
        x_0 = batch["target"]
        batch = draws(x_0.shape, generator) | batch
        t, noise, reference_noise, dropped = (
            batch[name].to(x_0.device) for name in ("t", "noise", "reference_noise", "dropped")
        )
        known = (~dropped).to(x_0.dtype)[:, None, None, None]
        coarse, mask = known * batch["coarse"], known * batch["mask"]  # the extractor's mask goes with it, as released
        x_t = self.schedule.add_noise(x_0, noise, t)
        output = self.predict(x_t, t, batch["reference"], coarse, mask, reference_noise).float()
        target, weight = noise, 1
        if self.schedule.prediction == "v_prediction":
            alpha, sigma = self.schedule.alpha_sigma(t, x_0)
            target = alpha * noise - sigma * x_0
            # Without the coarse edit nobody can know the picture, and v's error is mostly the picture's: there, as the
            # noise's. An error of v is alpha times as large in the noise.
            weight = torch.where(dropped, alpha.flatten() ** 2, 1)
        return (weight * (output - target).square().mean((1, 2, 3))).mean()

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def denoiser(self, reference, coarse, mask, timesteps=(), noise=None, memory=2**30):
        """The function that samplers and Algorithm 1 call: (x_t, t) -> what `predict` does, both (B N, C, h, w).

        reference, coarse, mask  of B edits, as for `forward`; x_t holds N samples of each, edit by edit
        timesteps                a sampler's, in its order: then the extractor runs for several of them in one batch
        noise                    the reference's: timestep -> (B, C, h, w). None: a draw for every timestep, the same
                                 in each call. It is one for all samples of an edit, because the extractor runs once
        memory                   bytes of keys and values to hold at once; making them takes about as much again.
                                 512x512 in half precision, Stable Diffusion's widths: 46 MB per timestep and edit
        """
        like = self.synthesizer.conv_in.weight
        reference, coarse, mask = (x.to(like.device, torch.float32) for x in (reference, coarse, mask))
        timesteps, B = list(timesteps), len(reference)
        if noise is None:  # steps beyond the sampler's own: its noise at step i < T must not be the reference's
            draw = diffusion.step_noise(reference.shape[1:], [0] * B)
            noise = lambda t: draw(T + t)  # noqa: E731
        times = self.synthesizer.times_of(timesteps)
        ready, size = {}, None  # timestep -> its details; bytes of one timestep's

        def details(t):
            nonlocal size
            if t not in ready:
                ahead = timesteps[timesteps.index(t):] if t in timesteps else [t]
                ahead = ahead[: max(1, memory // size) if size else 1]  # the first alone, to see how large they are
                n = len(ahead)
                ready.clear()
                made = self.details(
                    reference.repeat(n, 1, 1, 1), mask.repeat(n, 1, 1, 1),
                    torch.tensor(ahead, device=like.device).repeat_interleave(B),
                    torch.cat([noise(s) for s in ahead]).to(reference),
                )
                size = sum(x.nbytes for pair in made for x in pair) // n or 1
                for i, s in enumerate(ahead):
                    ready[s] = [[x[i * B : (i + 1) * B] for x in pair] for pair in made]
            return ready[t]

        @torch.no_grad()
        def denoise(x_t, t):
            def each(x):  # of an edit -> of each of its samples; without a copy where there is one edit
                return x[:, None].expand(B, len(x_t) // B, *x.shape[1:]).flatten(0, 1)

            z = torch.cat([x_t, each(coarse), each(mask)], dim=1).to(like)
            return self.synthesizer(z, times(t), [[each(x) for x in pair] for pair in details(int(t[0]))])  # eq. 5

        return denoise

    @torch.no_grad()
    def sample(
        self, reference, coarse, mask, *, seeds=(0,), steps=50, eta=1.0, latent_init=True, callback=None, **more
    ):
        """Section 3.4: edits -> pictures, as latents.

        reference, coarse, mask  of B edits, as for `forward`
        seeds        N of them, for N samples of each edit. A sample depends on its own seed only
        steps, eta   of DDIM. The paper does not say eta; the release has 1, new noise at each step
        latent_init  start from the coarse edit under noise, equation 4; False: from noise alone, figure 4's left
        callback     called as callback(i, x_t) with the result of step i
        more         noise and memory, of `denoiser`
          ->         (B N, C, h, w), float32, edit by edit
        """
        sampler = diffusion.make_sampler("ddim", self.schedule, steps, eta=eta)
        seeds, shape, device = list(seeds), reference.shape[1:], self.synthesizer.conv_in.weight.device
        epsilon = torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        x_T = epsilon.repeat(len(reference), 1, 1, 1).to(device)
        if latent_init:  # eq. 4, its square root restored; T is the sampler's first step, 981 of 1000
            x_T = sampler.noise_to(0, coarse.to(device).float().repeat_interleave(len(seeds), dim=0), x_T)
        denoise = self.denoiser(reference, coarse, mask, sampler.timesteps, **more)
        step_noise = diffusion.step_noise(shape, seeds * len(reference))
        return diffusion.run_sampler(denoise, x_T, sampler, step_noise=step_noise, callback=callback)


def draws(shape, generator=None, drop=0.2):
    """All that is random in `loss` for latents of shape (B, C, h, w), from a generator on the CPU -> a dict.

    t, noise, reference_noise, and dropped (B,) bool: a share `drop` of samples whose coarse edit and mask are hidden.
    (The release drops for a whole batch at a time. Sample by sample it is the same share, more evenly.)
    """
    return {
        "t": torch.randint(0, T, shape[:1], generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "reference_noise": torch.randn(shape, generator=generator),
        "dropped": torch.rand(shape[:1], generator=generator) < drop,
    }


# ---------------------------------------------------------------------------------------------------------------------
# How much of what an edit leaves wrong is put right, shadows and reflections first of all. Neither paper has it, since
# it takes the truth: a scene rendered again, or photographed again with its things moved. For anyone's pictures:
#
#     region = changed_shadows(reference, truth, objects)
#     before, after, share = shadow_share(coarse, output, truth, region)


def changed_shadows(reference, truth, objects, least=0.02):
    """Where an edit changes shadows and reflections: what differs, and is no object.

    reference, truth  (B, 3, H, W) in [0, 1], before the edit and truly after it, with the same camera and light
    objects           (B, H, W) bool: where any object is in either; a pixel more is left out, for their smoothed edges
    least             the smallest difference that counts: a photograph's noise may ask for more
      ->              (B, H, W) bool
    """
    near = F.max_pool2d(objects[:, None].float(), 3, 1, 1)[:, 0] > 0
    return ((truth - reference).abs().amax(1) > least) & ~near


def shadow_share(coarse, output, truth, region, norm=torch.square):
    """The coarse edit's mean error in a region, the output's, and the share of the former that is gone.

    coarse, output, truth  (B, 3, H, W)
    region                 (B, H, W) bool, of `changed_shadows`, or any other
    norm                   of a difference: torch.square or torch.abs
      ->                   three floats. The share is 1 where all is right, 0 where as much is wrong as before, negative
                           where more is. ValueError for an empty region
    """
    if not region.any():
        raise ValueError("the region is empty: nothing changes in it, so that there is nothing to put right")
    before, after = (norm(x - truth).mean(1)[region].mean() for x in (coarse, output))
    return before.item(), after.item(), (1 - after / before).item()


# ---------------------------------------------------------------------------------------------------------------------
# From Stable Diffusion

SECOND = re.compile(r"(.*transformer_blocks\.\d+)\.(attn2|norm2)\..*")  # attention to the text, and its layer norm
FIRST = re.compile(r"(.*transformer_blocks\.\d+)\.(attn|norm)1(\..*)")  # self-attention


def from_stable_diffusion(sd, cross_reference=True, schedule=None):
    """Section 3.4: a Magic Fixup to be trained, in float32, from any `sd.StableDiffusion`.

    cross_reference=False gives the ablation without the detail extractor; schedule=None keeps the noise schedule and
    the prediction that the weights know, any other has to be learned. The autoencoder is shared with `sd`. With
    features of zero the synthesizer is Stable Diffusion without its text attention, exactly.
    """
    C = sd.unet.config.out_channels

    def start(context):
        own = sd.unet.state_dict()
        tensors = {name: w.to(torch.float32, copy=True) for name, w in own.items() if not SECOND.fullmatch(name)}
        old = tensors["conv_in.weight"][:, :C]  # an inpainting model has more columns already, which mean other things
        tensors["conv_in.weight"] = F.pad(old, (0, 0, 0, 0, 0, C + 1))
        # The attention to the reference begins as a copy of self-attention (so in the release): it looks for things
        # that look alike. Its norm is copied with it, and its bias is zero: where nothing is found it adds nothing.
        for name in list(tensors) if context is None else ():
            if match := FIRST.fullmatch(name):
                block, kind, rest = match.groups()
                w = tensors[name]
                tensors[f"{block}.{kind}2{rest}"] = torch.zeros_like(w) if rest == ".to_out.0.bias" else w.clone()
        config = replace(sd.unet.config, in_channels=2 * C + 1, context=context)
        return build("unet", tensors, "this Stable Diffusion", config)

    synthesizer, extractor = (start(None), start(0)) if cross_reference else (start(0), None)
    return MagicFixup(synthesizer, extractor, sd.vae, schedule or sd.schedule, sd.size)


# ---------------------------------------------------------------------------------------------------------------------
# Load, save


def recognises(path):
    """Is there a Magic Fixup at that path, whole or not? For a word of help where something else was expected."""
    path = Path(path)
    with contextlib.suppress(ValueError, OSError):
        prefix = PREFIX["extractor"]
        return (path / "synthesizer").is_dir() or any(name.startswith(prefix) for name in read_tensors(path))
    return False


@uncollected()
def load(path, dtype=None, device="cpu"):
    """Read a Magic Fixup, of any width, as a frozen model in eval mode.

    path   a folder written by `save`, or the released weights: one pickled state dict, of which nothing is executed
    dtype  None: as stored, the weights stay in the file, mapped. Otherwise cast

    FileNotFoundError or ValueError, of one line, for a path that is not there, damaged, refused, or no Magic Fixup.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        return load_folder(path, dtype, device) if path.is_dir() else load_released(path, dtype, device)
    except ValueError as e:
        raise e if str(path) in str(e) else ValueError(f"{path}: {e}") from None


INDEX = "mfx.json"  # {"vae": where that part is, seen from this folder}; without the file it is in vae/


def load_folder(path, dtype, device):
    for part in ("synthesizer", "scheduler"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"{path} is not a Magic Fixup: there is no folder {part}/ in it")
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    vae = (path / str(index.get("vae", "vae"))).resolve()
    if not vae.is_dir():
        raise FileNotFoundError(f"{path} needs the autoencoder in {vae}, and there is no such folder")
    synthesizer, vae = load_part(path / "synthesizer", "unet", dtype, device), load_part(vae, "vae", dtype, device)
    extractor = None if synthesizer.config.context == 0 else load_part(path / "extractor", "unet", dtype, device)
    schedule = schedule_from_json(read_json(path / "scheduler" / "scheduler_config.json"))
    return MagicFixup(synthesizer, extractor, vae, schedule, latent_side(path / "synthesizer") * vae.config.factor)


PREFIX = {"synthesizer": "model.diffusion_model.", "extractor": "model.reference_model.", "vae": "first_stage_model."}
# What the release's file holds and its sampling never reads: a branch that looked at the picture with DINO, attention
# to that branch's (once the text's) tokens, ways to merge attentions that were tried, and, in the extractor, which has
# nothing to look up, the attention to the reference.
UNUSED = re.compile(
    r"cond_stage_model\..*|proj_out\..*|learnable_vector|.*\.merge_attentions(_missing)?\..*"
    r"|model\.\w+\..*\.transformer_blocks\.\d+\.attn2\..*"
    r"|model\.reference_model\..*\.transformer_blocks\.\d+\.(attn3|norm2)\..*"
)


def load_released(path, dtype, device):
    tensors = read_tensors(path)
    names = [name for name in tensors if not (UNUSED.fullmatch(name) or IGNORED.fullmatch(name))]
    unknown = [name for name in names if not name.startswith(tuple(PREFIX.values()))]

    def part(name, kind, config=None):
        prefix = PREFIX[name]
        found = {name.removeprefix(prefix): tensors[name] for name in names if name.startswith(prefix)}
        if not found:
            raise ValueError(f"{path} is not a whole Magic Fixup checkpoint: it has no tensors {prefix}*; its first is "
                             f"{next(iter(tensors))}")
        found = {name.replace(".attn3.", ".attn2."): tensor for name, tensor in found.items()}
        return build(kind, translate(kind, found), path, config, dtype, device)

    extractor = part("extractor", "unet")
    synthesizer = part("synthesizer", "unet", replace(extractor.config, context=None))
    vae = part("vae", "vae")
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} unexpected tensors, e.g. {', '.join(unknown[:3])}")
    return MagicFixup(synthesizer, extractor, vae, released_schedule(path, tensors), size=64 * vae.config.factor)


def released_schedule(path, tensors):
    """The noise schedule lies in the file as a buffer, which the release reads with the weights, and so goes by."""
    schedules = {name: Schedule(name) for name in BETAS}
    abar = tensors.get("alphas_cumprod", schedules["zero_snr"].alphas_cumprod)
    for schedule in schedules.values():
        if abar.shape == (T,) and torch.allclose(abar.float(), schedule.alphas_cumprod, atol=1e-3, rtol=0):
            return schedule
    raise ValueError(f"{path}: its noise schedule (alphas_cumprod) is none of {', '.join(schedules)}")


def save(model, folder, dtype=None, vae=None):
    """Write a folder that `load` reads. Each file is written whole or not at all, and the scheduler's, without which
    there is no Magic Fixup, comes last.

    dtype  the stored precision, None as it is
    vae    where this very autoencoder is on the disk already, seen from `folder`: "../toy/vae". It is then not written
           again (and a copy in `folder` is no longer read). ValueError if another one is there
    """
    folder = Path(folder)
    if vae is not None:
        there = load_part((folder / vae).resolve(), "vae").state_dict()  # `folder` itself need not exist yet
        for name, tensor in model.vae.state_dict().items():
            if name not in there or not torch.equal(tensor.cpu().to(there[name].dtype), there[name]):
                raise ValueError(f"{folder / vae} is another autoencoder than the model's, e.g. in {name}")
    latent = model.size // model.vae.config.factor
    for part in ("synthesizer", "extractor") if model.extractor else ("synthesizer",):
        save_part(getattr(model, part), folder / part, dtype, sample_size=latent)
    if vae is None:
        save_part(model.vae, folder / "vae", dtype, sample_size=model.size)
    write_json(folder / INDEX, {"vae": str(vae or "vae")})
    write_json(folder / "scheduler" / "scheduler_config.json", schedule_to_json(model.schedule))
