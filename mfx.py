"""Magic Fixup: a collage of a photograph -> a photograph. Alzayer et al. 2024, arXiv 2403.13044.

Two UNets begin as Stable Diffusion without its text. The *detail extractor* sees the untouched
reference. The *synthesizer* denoises the edit; each of its transformer blocks looks up in the same
block of the extractor what the things in the picture are made of.

    I         reference   (B, C, h, w)  the photograph before the edit, encoded
    I_coarse  coarse      (B, C, h, w)  the collage, its holes filled by a simple algorithm, encoded
    M         mask        (B, 1, h, w)  1 = content survived the edit, 0 = hole

    model = from_stable_diffusion(sd.load("weights/toy"))
    optimizer = torch.optim.Adam(model.unfreeze(), lr=1e-5)
    model.loss({"reference": .., "target": .., "coarse": .., "mask": ..}).backward()

    model = load("weights/toy-mfx")                               or the released weights' file
    x_0 = model.sample(reference, coarse, mask, seeds=range(5))   five versions of one edit

Equation numbers are the paper's. Where the released program differs from it, a comment says so.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import diffdiff
import samplers
from checkpoints.magicfixup import read_magic_fixup
from checkpoints.magicfixup import save as save
from checkpoints.parts import build_part
from diffusion import T, draw_noise, draw_timesteps

# --------------------------------------------------------------------------------------------------
# The model

# Bytes of keys and values that sampling holds at once; making them takes about as much again. One
# timestep of one edit has 46 MB at Stable Diffusion's widths, 512x512, in half precision.
MEMORY = 2**30


class MagicFixup(nn.Module):
    """Both UNets, the autoencoder that they work behind, and the noise schedule.

    synthesizer  UNet: 2C + 1 channels in, C out, a second attention to features as wide as its own
                 blocks (context=None)
    extractor    UNet: 2C + 1 channels in, no second attention (context=0). None: the ablation
    image_encoder  of the ablation, in the extractor's place: the synthesizer attends to a single
                 vector, what CLIP's network makes of the reference (context=its width)
    size         pixels along a side of the square pictures that it is for
    as_paper     True: as the paper's text says, where its release differs. The synthesizer reads 11
                 features, not 16; a latent of the mask is its nearest pixel, not the mean of its
                 pixels (the release's is bilinear); training never hides the coarse edit. The
                 text's noise schedule is Schedule("linear")
    ValueError if the parts do not fit together.
    """

    def __init__(self, synthesizer, extractor, vae, schedule, size=512, as_paper=False,
                 image_encoder=None):
        super().__init__()
        self.synthesizer = synthesizer
        self.extractor = extractor
        self.vae = vae
        self.image_encoder = image_encoder
        self.schedule = schedule
        self.size = size
        self.as_paper = as_paper
        config = synthesizer.config
        C, channels = vae.config.latent_channels, (config.in_channels, config.out_channels)
        if channels != (2 * C + 1, C):
            raise ValueError(f"a synthesizer for {C} latent channels has {2 * C + 1} channels in, "
                             f"{C} out, not {channels[0]} and {channels[1]}")
        if config.context != (image_encoder.config.projection if image_encoder else None):
            raise ValueError("a synthesizer attends to the features of an extractor, or to the "
                             "vector of an image encoder")
        if bool(extractor) == bool(image_encoder):
            raise ValueError("there is an extractor, or else an image encoder")
        if extractor and extractor.config != replace(config, context=0):
            raise ValueError("the extractor is not built as the synthesizer is")

    @property
    def drop(self):
        """The share of coarse edits that training hides"""
        return 0.0 if self.as_paper else 0.2

    def encode_image(self, x):
        """x (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), float32"""
        return self.vae.encode_scaled(x)

    def decode(self, z):
        """latents (B, C, h, w) -> (B, 3, H, W), float32, about [-1, 1]"""
        return self.vae.decode_scaled(z)

    def encode_edit(self, reference, coarse, mask):
        """Pictures (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) -> the same three for `forward`.
        The ablation's reference is its embedding, (B, 1, D)."""
        coarse = self.encode_image(coarse)
        if self.image_encoder:
            reference = self.image_encoder.embed(reference).float()[:, None]
        else:
            reference = self.encode_image(reference)
        resize = F.interpolate if self.as_paper else diffdiff.down_sample  # section 3.1
        return reference, coarse, resize(mask, coarse.shape[-2:]).to(coarse)

    def blind_blocks(self):
        """The synthesizer's transformer blocks that do not look at the reference. The paper reads
        "each of the n = 11"; Stable Diffusion has 16, and the release reads all. Those below the
        latents' own resolution are 11."""
        if not (self.as_paper and self.extractor):
            return []
        unet = self.synthesizer
        at_full = {*unet.down_blocks[0].modules(), *unet.up_blocks[-1].modules()}
        return [block for block in unet.transformer_blocks() if block in at_full]

    def extract_details(self, reference, mask, t, noise):
        """What the synthesizer reads of the reference at t (B,) -> a block's keys and values,
        [(B, heads, N, d) twice]. They do not depend on the edit's own latent."""
        if self.image_encoder:
            return self.synthesizer.keys_values(reference.to(self.synthesizer.conv_in.weight))
        # Equation 2, whose (1 - abar) lacks its square root in print
        I_t = self.schedule.add_noise(reference, noise, t)
        z = torch.cat([I_t, reference, mask], dim=1).to(self.extractor.conv_in.weight.dtype)
        F_t = self.extractor.features(z, t)  # equation 3: [(B, N, width)] of every block
        # Figure 3, right: keys and values are made of f_t, queries will be made of g_t.
        details = self.synthesizer.keys_values(F_t)
        for block in self.blind_blocks():
            details[block.index] = ()
        return details

    def predict(self, x_t, t, reference, coarse, mask, noise):
        """As `forward`, but the network's own output: v where the schedule's prediction is v."""
        details = self.extract_details(reference, mask, t, noise)
        z = torch.cat([x_t, coarse, mask], dim=1)  # (B, 2C + 1, h, w)
        return self.synthesizer(z.to(self.synthesizer.conv_in.weight.dtype), t, details)

    def forward(self, x_t, t, reference, coarse, mask, noise):
        """The predicted noise of x_t.

        x_t, reference, coarse  (B, C, h, w), latents; x_t noised to t
        t                       (B,) in 0 .. 999
        mask                    (B, 1, h, w), 1 = kept
        noise                   (B, C, h, w), the reference's (equation 2); x_t has one of its own
          ->                    (B, C, h, w)
        """
        output = self.predict(x_t, t, reference, coarse, mask, noise)
        return self.schedule.convert_output(output.to(x_t.dtype), x_t, t)[1]

    # ----------------------------------------------------------------------------------------------
    # Training

    def unfreeze(self):
        """Make trainable what the loss depends on -> the parameters, for the optimizer.

        Both UNets, without what the extractor computes after its last feature; never the VAE.
        """
        self.requires_grad_(False)
        self.synthesizer.requires_grad_(True)
        for block in self.blind_blocks():
            block.attn2.requires_grad_(False)
            block.norm2.requires_grad_(False)
        if self.extractor:
            self.extractor.requires_grad_(True)
            for module in modules_after_last_feature(self.extractor, bool(self.blind_blocks())):
                module.requires_grad_(False)
        return [p for p in self.parameters() if p.requires_grad]

    def loss(self, batch, generator=None):
        """The mean squared error of the prediction, a scalar.

        batch      latents "reference", "target", "coarse" (B, C, h, w) and "mask" (B, 1, h, w). It
                   may also hold any entry of `draws`, to be used instead of a fresh one
        generator  of all that is random here, on the CPU

        The paper predicts the noise. v = alpha noise - sigma x_0 (Salimans & Ho 2022) is for short
        trainings: at t = 981 an error of the noise is 13 times as large in the picture.
        """
        x_0 = batch["target"]
        drawn = ("t", "noise", "reference_noise", "dropped")
        if any(name not in batch for name in drawn):
            batch = draws(x_0.shape, generator, self.drop) | batch
        t, noise, reference_noise, dropped = (batch[name].to(x_0.device) for name in drawn)
        # With the coarse edit the mask goes, for both UNets, as in the release.
        known = (~dropped).to(x_0.dtype)[:, None, None, None]
        coarse = known * batch["coarse"]
        mask = known * batch["mask"]

        x_t = self.schedule.add_noise(x_0, noise, t)
        output = self.predict(x_t, t, batch["reference"], coarse, mask, reference_noise).float()
        target, weight = noise, 1
        if self.schedule.prediction == "v_prediction":
            alpha, sigma = self.schedule.alpha_sigma(t, x_0)
            target = alpha * noise - sigma * x_0
            # Without the coarse edit nobody can know the picture, and most of v's error is the
            # picture. The noise's error is alpha times v's, so alpha^2 weighs v's error like it.
            weight = torch.where(dropped, alpha.flatten() ** 2, 1)
        return (weight * (output - target).square().mean((1, 2, 3))).mean()

    # ----------------------------------------------------------------------------------------------
    # Sampling

    def denoiser(self, reference, coarse, mask, timesteps=(), noise=None):
        """The function that samplers and Algorithm 1 call: (x_t, t) -> output, both (B N, C, h, w).

        reference, coarse, mask  of B edits, as for `forward`; x_t has N samples of each edit
        timesteps                a sampler's, in its order: the extractor runs ahead for several
        noise                    the reference's: timestep -> (B, C, h, w). None: a draw for every
                                 timestep, the same in each call
        """
        like = self.synthesizer.conv_in.weight
        reference = reference.to(like.device, torch.float32)
        coarse = coarse.to(like.device, torch.float32)
        mask = mask.to(like.device, torch.float32)
        timesteps, B = list(timesteps), len(reference)
        if noise is None:
            # Steps beyond the sampler's own: its noise at a step must not be the reference's.
            draw = samplers.make_step_noise(coarse.shape[1:], [0] * B)

            def noise(t):
                return draw(T + t)

        details = self.extract_ahead(reference, mask, timesteps, noise)
        times = self.synthesizer.times_of(timesteps)

        @torch.no_grad()
        def denoise(x_t, t):
            N = len(x_t) // B
            z = torch.cat([x_t, repeat_each(coarse, N), repeat_each(mask, N)], dim=1).to(like)
            seen = [[repeat_each(x, N) for x in pair] for pair in details(int(t[0]))]
            return self.synthesizer(z, times(t), seen)  # equation 5

        return denoise

    def extract_ahead(self, reference, mask, timesteps, noise):
        """-> details(t), which are `extract_details` at timestep t. The extractor runs for as many
        of the timesteps in one batch as fit into MEMORY."""
        B = len(reference)
        ready = {}  # timestep -> details

        def extract(ahead):
            n = len(ahead)
            t = torch.tensor(ahead, device=reference.device).repeat_interleave(B)
            noises = torch.cat([noise(one) for one in ahead]).to(reference)
            details = self.extract_details(torch.cat([reference] * n), mask.repeat(n, 1, 1, 1), t,
                                           noises)
            for i, one in enumerate(ahead):
                ready[one] = [[x[i * B : (i + 1) * B] for x in pair] for pair in details]

        at_once = 1  # the first timestep runs alone, and shows how many fit into memory

        def details(t):
            nonlocal at_once
            if t not in ready:
                ready.clear()
                extract(timesteps[timesteps.index(t) :][:at_once] if t in timesteps else [t])
                at_once = max(1, MEMORY // sum(x.nbytes for pair in ready[t] for x in pair))
            return ready[t]

        return details

    @torch.no_grad()
    def sample(self, reference, coarse, mask, *, seeds=(0,), steps=50, eta=1.0, latent_init=True,
               noise=None):
        """Section 3.4: edits -> pictures, as latents.

        reference, coarse, mask  of B edits, as for `forward`
        seeds        N of them, for N samples of each edit. A sample depends on its own seed only
        steps, eta   of DDIM. The release has eta = 1: new noise at each step; the paper is silent
        latent_init  start from the noised coarse edit (equation 4); False: from noise (figure 4)
        noise        the reference's, of `denoiser`
          ->         (B N, C, h, w), float32, edit by edit
        """
        sampler = samplers.make_sampler("ddim", self.schedule, steps, eta=eta)
        device = self.synthesizer.conv_in.weight.device
        seeds, shape, B = list(seeds), coarse.shape[1:], len(coarse)
        x_T = draw_noise(shape, seeds).repeat(B, 1, 1, 1).to(device)
        if latent_init:
            # Equation 4, its square root restored; T is the sampler's first step, 981 of 1000.
            each = coarse.to(device).float().repeat_interleave(len(seeds), dim=0)
            x_T = sampler.noise_to(0, each, x_T)
        denoise = self.denoiser(reference, coarse, mask, sampler.timesteps, noise)
        step_noise = samplers.make_step_noise(shape, seeds * B)
        return samplers.run_sampler(denoise, x_T, sampler, step_noise=step_noise)


def repeat_each(x, n):
    """(B, ...) -> (B n, ...), each n times in a row; without a copy where B is 1"""
    return x[:, None].expand(len(x), n, *x.shape[1:]).flatten(0, 1)


def draws(shape, generator=None, drop=0.2):
    """All that is random in `loss` for latents of shape (B, C, h, w), from a generator on the CPU.

    ->  t, noise, reference_noise, and dropped (B,) bool, the share `drop` of samples whose coarse
        edit and mask are hidden. (The release drops for a whole batch at a time.)
    """
    return {
        "t": draw_timesteps(shape[0], generator),
        "noise": torch.randn(shape, generator=generator),
        "reference_noise": torch.randn(shape, generator=generator),
        "dropped": torch.rand(shape[:1], generator=generator) < drop,
    }


def modules_after_last_feature(unet, below_full=False):
    """What a UNet computes after its last feature, the input of its last self-attention: of all, or
    `below_full` resolution."""
    levels = list(unet.up_blocks)
    after = [unet.conv_norm_out, unet.conv_out]
    if below_full:
        after.append(levels.pop())
    while not len(levels[-1].attentions):
        after.append(levels.pop())
    after.append(levels[-1].upsamplers)
    transformer = levels[-1].attentions[-1]
    block = transformer.transformer_blocks[-1]
    return [*after, block.attn1, block.norm3, block.ff, transformer.proj_out]


# --------------------------------------------------------------------------------------------------
# From Stable Diffusion

SECOND = re.compile(r"(.*transformer_blocks\.\d+)\.(attn2|norm2)\..*")  # text attention, its norm
FIRST = re.compile(r"(.*transformer_blocks\.\d+)\.(attn|norm)1(\..*)")  # self-attention, its norm


def from_stable_diffusion(sd, schedule=None, as_paper=False, image_encoder=None):
    """Sections 3.2 to 3.4: a Magic Fixup to train, in float32, from a Stable Diffusion 1 or 2.

    schedule=None keeps the noise schedule and the prediction that the weights know. The autoencoder
    is shared with `sd`. With features of zero the synthesizer is exactly Stable Diffusion without
    its text attention. With an image encoder it is the ablation, which keeps that attention, to
    read the reference's embedding: CLIP's is as wide as SD 1's text; of others D is learned anew.
    """
    if sd.xl:
        raise ValueError("a Magic Fixup begins as a Stable Diffusion 1 or 2, not as an XL")
    C = sd.unet.config.out_channels

    def start(context):
        tensors = {}
        for name, w in sd.unet.state_dict().items():
            if context or not SECOND.fullmatch(name):
                tensors[name] = w.to(torch.float32, copy=True)
            if context and re.search(r"attn2\.to_[kv]\.", name) and w.shape[1] != context:
                tensors[name] = nn.Linear(context, len(w), bias=False).weight.detach()
        # New input channels begin at zero. (An inpainting model's own mean other things.)
        tensors["conv_in.weight"] = F.pad(tensors["conv_in.weight"][:, :C], (0, 0, 0, 0, 0, C + 1))
        # The attention to the reference begins as a copy of self-attention, as in the release: it
        # looks for what looks alike. Its bias is zero: where nothing is found it adds nothing.
        own = [name for name in tensors if FIRST.fullmatch(name)] if context is None else []
        for name in own:
            block, kind, rest = FIRST.fullmatch(name).groups()
            w = tensors[name].clone()
            if rest == ".to_out.0.bias":
                w.zero_()
            tensors[f"{block}.{kind}2{rest}"] = w
        config = replace(sd.unet.config, in_channels=2 * C + 1, context=context)
        return build_part("unet", tensors, "this Stable Diffusion", config)

    extractor = None if image_encoder else start(0)
    synthesizer = start(image_encoder.config.projection if image_encoder else None)
    return MagicFixup(synthesizer, extractor, sd.vae, schedule or sd.schedule, sd.size, as_paper,
                      image_encoder)


# --------------------------------------------------------------------------------------------------
# From a file


def load(path, dtype=None, device="cpu"):
    """Read a Magic Fixup, of any width, as a frozen model in eval mode.

    path   a folder written by `save`, or the released weights: a pickled state dict, never run
    dtype  as for `sd.load`
    FileNotFoundError or ValueError, of one line, for a path that is not there, damaged, refused, or
    no Magic Fixup.
    """
    try:
        return MagicFixup(**read_magic_fixup(Path(path), dtype, device))
    except ValueError as e:
        if str(path) in str(e):
            raise
        raise ValueError(f"{path}: {e}") from None
