"""Any model that a person runs in diffusers, as the `denoise` of diffdiff.py: Stable Diffusion 3, Flux and XL.

The weights, their precision or quantisation, adapters and offloading are the pipeline's own. Of the pipeline this uses
its network, `encode_prompt`, the autoencoder and what the scheduler's configuration says. diffusers itself is not
imported here. docs/with_diffusers.md has a whole edit.

    denoise = pipelines.make_denoiser(pipe, prompt, guidance=3.5)
    z_init = pipelines.encode(pipe, picture)
    sampler = pipelines.make_sampler(pipe, z_init, k=28)
    z = differential_diffusion(denoise, z_init, change_map, sampler)
    picture = pipelines.decode(pipe, z)

Latents are (B, C, h, w) here, scaled and shifted as the network reads them, and best in float32; Flux's tokens are made
of them, and latents of tokens, at each call.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import samplers
from checkpoints.configs import schedule_from_json
from diffusion import T

KINDS = {  # what a class of pipelines runs. Any other tells its network other things
    "StableDiffusionXLPipeline": "xl",
    "StableDiffusionXLImg2ImgPipeline": "xl",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
}
UNKNOWN = ("shift_terminal", "invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas",
           "use_beta_sigmas")  # options of a scheduler that give other noise levels than ours


def recognise(pipe):
    """A pipeline -> 'xl', 'sd3' or 'flux'. ValueError for any other, and for XL's refiner."""
    kinds = [KINDS[c.__name__] for c in type(pipe).__mro__ if c.__name__ in KINDS]
    if not kinds:
        raise ValueError(f"a {type(pipe).__name__} is not known here: take one of {', '.join(KINDS)}")
    if kinds[0] == "xl" and pipe.config.get("requires_aesthetics_score"):
        raise ValueError("a refiner of Stable Diffusion XL is not known here: take the base, or sample.py --refiner")
    return kinds[0]


# ----------------------------------------------------------------------------------------------------------------------
# The network


@torch.no_grad()
def make_denoiser(pipe, prompt, negative=None, guidance=5.0):
    """-> denoise(z, t): z (B, C, h, w), t (B,) -> the network's output (B, C, h, w), guided, in z's precision

    prompt    a string, for all pictures; encoded once, here
    negative  a string, or None for what the pipeline makes of none
    guidance  classifier-free for Stable Diffusion 3 and XL: above 1 each call runs two latents for one. Flux reads the
              number, unless it was distilled to few steps and has no input for it
    ValueError for a negative prompt to Flux, a pipeline of another kind, and latents that its network cannot read.
    """
    kind = recognise(pipe)
    guided = kind != "flux" and guidance > 1
    if kind == "flux":
        if negative is not None:
            raise ValueError("Flux reads no negative prompt: leave it out")
        context, pooled, _ = pipe.encode_prompt(prompt, None)
    else:
        prompts = (prompt, None) if kind == "xl" else (prompt, None, None)
        texts = pipe.encode_prompt(*prompts, do_classifier_free_guidance=guided, negative_prompt=negative)
        context, context_without, pooled, pooled_without = texts
        if guided:
            context = torch.cat([context_without, context])
            pooled = torch.cat([pooled_without, pooled])
    ask = {"xl": ask_xl, "sd3": ask_sd3, "flux": ask_flux}[kind]
    passes = 2 if guided else 1

    @torch.no_grad()
    def denoise(z, t):
        B, _, h, w = z.shape
        if kind != "xl" and (h % 2 or w % 2):
            raise ValueError(f"latents of {h} x {w} make no whole tokens: take a picture whose sides are multiples of "
                             f"{2 * pipe.vae_scale_factor} pixels")
        x = z.to(context).repeat(passes, 1, 1, 1)
        times = t.to(context.device).repeat(passes)
        output = ask(pipe, x, times, context.repeat_interleave(B, 0), pooled.repeat_interleave(B, 0), guidance)
        if guided:
            without, given = output.chunk(2)
            output = without + guidance * (given - without)
        return output.to(z)

    return denoise


def ask_xl(pipe, x, t, context, pooled, guidance):
    """x (N, C, h, w), t (N,), context (N, L, D), pooled (N, P) -> (N, C, h, w)"""
    # The picture counts as whole, at its original size, and is drawn as large as it is.
    height = x.shape[-2] * pipe.vae_scale_factor
    width = x.shape[-1] * pipe.vae_scale_factor
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(x)).to(context)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return pipe.unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]


def ask_sd3(pipe, x, t, context, pooled, guidance):
    return pipe.transformer(hidden_states=x, timestep=t, encoder_hidden_states=context, pooled_projections=pooled,
                            return_dict=False)[0]


def ask_flux(pipe, x, t, context, pooled, guidance):
    h, w = x.shape[-2:]
    number = None
    if pipe.transformer.config.guidance_embeds:
        number = torch.full((len(x),), float(guidance), device=x.device)
    tokens = pipe.transformer(
        hidden_states=pack(x), timestep=t.to(x.dtype) / T, guidance=number, pooled_projections=pooled,
        encoder_hidden_states=context, txt_ids=torch.zeros(context.shape[1], 3).to(x),
        img_ids=number_tokens(h // 2, w // 2).to(x), return_dict=False)[0]
    return unpack(tokens, h, w)


def pack(z):
    """Flux's tokens: (B, C, h, w) -> (B, h/2 w/2, 4 C), each 2 x 2 latents, channel by channel"""
    return F.pixel_unshuffle(z, 2).flatten(2).mT


def unpack(tokens, h, w):
    return F.pixel_shuffle(tokens.mT.unflatten(2, (h // 2, w // 2)), 2)


def number_tokens(rows, columns):
    """Where each of Flux's tokens stands: (rows columns, 3), of 0, row, column"""
    return torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(columns))


# ----------------------------------------------------------------------------------------------------------------------
# The schedule: rectified flow


class RectifiedFlow:
    """A straight line from the picture to the noise, z = (1 - sigma) x0 + sigma noise: 2403.03206,
    eq. 13. The network says its direction, the velocity noise - x0, at the time t = T sigma.

    shift  how long a run stays where there is much noise: 1 spaces its levels evenly. A large
           picture needs more (eq. 23). Stable Diffusion 3 has 3, Flux `dynamic_shift`
    last   sigma of the last step, before the shift. None: 1 / k, as Flux has it

    ValueError for a shift of 0 or less, or a last sigma that is no level between.
    """

    def __init__(self, shift: float = 1.0, last: float | None = None):
        if not shift > 0:
            raise ValueError(f"the shift of a rectified flow is more than 0, not {shift}")
        if last is not None and not 0 < last < 1:
            raise ValueError(f"the last sigma of a rectified flow lies between 0 and 1, not {last}")
        self.shift = shift
        self.last = last

    def sigmas(self, k: int) -> list[float]:
        """The k + 1 noise levels that k steps visit: 1, .., 0. ValueError for less than a step."""
        if k < 1:
            raise ValueError(f"the number of steps must be 1 or more, not {k}")
        last = 1 / k if self.last is None else self.last
        levels = []
        for i in range(k):
            even = 1 - (1 - last) * i / max(k - 1, 1)
            levels.append(self.shift * even / (1 + (self.shift - 1) * even))
        return levels + [0.0]

    def add_noise(self, x0: Tensor, noise: Tensor, t: float) -> Tensor:
        """x0, noise (B, C, h, w); t in 0 .. T, not whole -> z_t (B, C, h, w)"""
        sigma = t / T
        return (1 - sigma) * x0 + sigma * noise.to(x0)


def dynamic_shift(tokens: int, low=(256, 0.5), high=(4096, 1.15)) -> float:
    """Flux's shift for a picture of so many tokens, each 2 x 2 latents: its logarithm is a line.

    low, high  (tokens, log shift) at two points of the line. These are Flux's
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


def flow_euler(schedule: RectifiedFlow, k: int) -> samplers.Sampler:
    """Rectified flow by Euler's method. The model is asked with t (B,) float, for a velocity."""
    sigma = schedule.sigmas(k)
    # Of a `Ladder` what `Sampler` and its callers read. These timesteps are not whole.
    ladder = SimpleNamespace(schedule=schedule, k=k, timesteps=[T * s for s in sigma[:-1]])

    def step(model, z, i, state=None, noise=None, restarted=None):
        t = torch.full((len(z),), ladder.timesteps[i], device=z.device)
        v = model(z, t).to(z.dtype)
        return z + (sigma[i + 1] - sigma[i]) * v, None

    return samplers.Sampler(ladder, step)


def make_sampler(pipe, z, k):
    """The noise levels that the pipeline's scheduler has for k steps on latents z (B, C, h, w) -> a Sampler, of Euler
    or, for an LCMScheduler, lcm, which is stochastic

    ValueError for a scheduler whose levels are not made here.
    """
    kind, config = recognise(pipe), pipe.scheduler.config
    own = [option for option in UNKNOWN if config.get(option)]
    plain = "beta_schedule" if kind == "xl" else "shift"
    spacing = config.get("timestep_spacing", "leading")
    known = spacing in ("leading", "trailing") and plain in config
    if own or not known or config.get("num_train_timesteps", T) != T:
        said = f" with {' and '.join(own)}" if own else ""
        name = config.get("_class_name", type(pipe.scheduler).__name__)
        other = "a FlowMatchEulerDiscreteScheduler"
        if kind == "xl":
            other = "an EulerDiscreteScheduler of leading or trailing steps"
        raise ValueError(f"the noise levels of {name}{said} are not known here: give the pipeline {other}, or make a "
                         "sampler with samplers.py")
    if kind == "xl":
        name = "lcm" if type(pipe.scheduler).__name__ == "LCMScheduler" else "euler"
        return samplers.make_sampler(name, schedule_from_json(config), k)

    shift = static = config["shift"]
    if config.get("use_dynamic_shifting"):
        low = config["base_image_seq_len"], config["base_shift"]
        high = config["max_image_seq_len"], config["max_shift"]
        shift = dynamic_shift(z.shape[-2] * z.shape[-1] // 4, low, high)
        if config.get("time_shift_type") == "linear":
            shift = math.log(shift)
        static = 1.0
    # Stable Diffusion 3 walks to the scheduler's own last level, that of t = 1. So a static shift meets it twice.
    last = static / (T + static - 1) if kind == "sd3" else None
    return flow_euler(RectifiedFlow(shift, last), k)


# ----------------------------------------------------------------------------------------------------------------------
# The autoencoder


@torch.no_grad()
def encode(pipe, picture):
    """(B, 3, H, W) in -1 .. 1 -> latents (B, C, h, w) float32, of the mean, on the picture's device"""
    keep_finite(pipe.vae)
    config = pipe.vae.config
    mean = pipe.vae.encode(picture.to(pipe._execution_device, pipe.vae.dtype)).latent_dist.mode()
    mean = mean.to(picture.device).float()
    return (mean - (config.get("shift_factor") or 0)) * config.scaling_factor


@torch.no_grad()
def decode(pipe, z):
    """Latents (B, C, h, w) -> (B, 3, H, W) float32 in -1 .. 1, on z's device"""
    keep_finite(pipe.vae)
    config = pipe.vae.config
    z = z / config.scaling_factor + (config.get("shift_factor") or 0)
    picture = pipe.vae.decode(z.to(pipe._execution_device, pipe.vae.dtype), return_dict=False)[0]
    return picture.to(z.device).float().clamp(-1, 1)


def keep_finite(vae):
    """XL's autoencoder overflows in fp16, and its configuration says so: then it computes in fp32 from here on."""
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.float()
