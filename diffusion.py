"""The forward process: how much noise there is at each timestep.

    schedule = Schedule("scaled_linear")
    z_t = schedule.add_noise(x0, noise, t)

A latent at level abar, in Stable Diffusion's own (variance preserving) space, is

    z = sqrt(abar) x0 + sqrt(1 - abar) eps                                             DDPM eq. 4

and alpha = sqrt(abar), sigma = sqrt(1 - abar) throughout. samplers.py walks back from noise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

T = 1000  # training timesteps, in every model that this project reads
SPACINGS = "leading", "trailing", "linspace", "lcm"  # `Schedule.space_timesteps`
LCM_TIMESTEPS = 50  # those that a latent consistency model is distilled at


def draw_noise(shape: tuple, seeds) -> Tensor:
    """(N, *shape) standard normal, each by its own seed, on the CPU: the same in any batch"""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """betas (T,) -> betas whose last step leaves nothing of the picture: 2305.08891, algorithm 1"""
    alpha = (1 - betas).cumprod(dim=0).sqrt()
    # It ends at 0 and begins where it began.
    abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - abar / F.pad(abar[:-1], (1, 0), value=1.0)


def cosine_betas() -> Tensor:
    """betas (T,) of Improved DDPM, 2102.09672, section 3.2"""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # eq. 17
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


# beta_t, t = 0 .. T-1 (the papers' t = 1 .. T)
BETAS = {
    # Stable Diffusion
    "scaled_linear": torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2,
    # DDPM, and the text of Magic Fixup
    "linear": torch.linspace(1e-4, 0.02, T, dtype=torch.float64),
    # Kandinsky 2.2, and the toy: Stable Diffusion's ends, more noise between them
    "linear_sd": torch.linspace(0.00085, 0.012, T, dtype=torch.float64),
    # DeepFloyd IF, and Kandinsky's prior
    "squaredcos_cap_v2": cosine_betas(),
}
# Magic Fixup's release trains and samples with it; so do some models that predict v.
BETAS["zero_snr"] = zero_terminal_snr(BETAS["scaled_linear"])


class Schedule:
    """How much noise there is at each timestep, and what the network was trained to say about it.

    name        'scaled_linear' (Stable Diffusion), 'zero_snr' (the same, to no signal at all), or
                another of BETAS
    prediction  'epsilon' (the noise), 'v_prediction' (alpha eps - sigma x0: Progressive
                Distillation, 2202.00512) or 'sample' (x0)
    spacing     one of SPACINGS, and `offset`, 0 or 1: see `space_timesteps`
    clip        the largest absolute value of an x0, where the model was trained for that
    threshold   (ratio, most): dynamic thresholding in its place, for models of pixels

    .alphas_cumprod  (T,) float32, abar at t = 0 .. T-1

    ValueError for an unknown name, prediction or spacing.
    """

    def __init__(self, name: str = "scaled_linear", prediction: str = "epsilon",
                 spacing: str = "leading", offset: int = 1, clip: float | None = None,
                 threshold: tuple[float, float] | None = None):
        if name not in BETAS:
            raise ValueError(f"unknown noise schedule {name!r}: choose one of {', '.join(BETAS)}")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError("the prediction is epsilon, v_prediction or sample, not "
                             f"{prediction!r}")
        if spacing not in SPACINGS or type(offset) is not int or offset not in (0, 1):
            raise ValueError(f"timesteps are spaced as one of {', '.join(SPACINGS)}, with an "
                             f"offset of 0 or 1, not {spacing!r:.60} with {offset!r:.60}")
        self.name = name
        self.prediction = prediction
        self.spacing = spacing
        self.offset = offset
        self.clip = clip
        self.threshold = threshold
        abar = torch.cumprod(1 - BETAS[name], dim=0)  # float64: 1 - abar cancels badly near t = 0
        self.abar = abar.tolist()  # for the samplers' scalars
        self.alphas_cumprod = abar.float()
        self.alpha = abar.sqrt().float()  # (T,)
        self.sigma = (1 - abar).sqrt().float()

    def space_timesteps(self, k: int, spacing: str | None = None) -> list[int]:
        """The k timesteps that k steps visit, falling, as diffusers computes them: 2305.08891,
        table 2. spacing None: the schedule's own.

        leading   Stable Diffusion's: 981, 961, .., 21, 1 for k = 50. The stride is the whole number
                  T // k. So a few steps start well below the noisiest level, at t = 751 for k = 4,
                  and so does a large k that does not divide T, at t = 600 for k = 600
        trailing  from the noisiest level, for models of few steps: 999, 749, 499, 249 for k = 4
        linspace  from the noisiest level to the cleanest: 999, 666, 333, 0
        lcm       those that a latent consistency model knows: 999, 759, 499, 259. ValueError for a
                  k above LCM_TIMESTEPS
        """
        spacing = spacing or self.spacing
        if spacing == "leading":
            offset = self.offset if k < T else 0  # k = T visits every timestep
            return [i * (T // k) + offset for i in reversed(range(k))]
        if spacing == "trailing":
            stride = T - (T - T / k)  # rounded as NumPy's arange rounds it
            return [round(T - i * stride) - 1 for i in range(k)]
        if spacing == "linspace":
            stride = (T - 1) / max(k - 1, 1)
            return [round(i * stride) for i in reversed(range(k))]
        if k > LCM_TIMESTEPS:
            raise ValueError(f"a latent consistency model knows {LCM_TIMESTEPS} timesteps: take at "
                             f"most as many steps, not {k}")
        stride = T // LCM_TIMESTEPS
        return [T - 1 - stride * int(i * (LCM_TIMESTEPS / k)) for i in range(k)]

    def alpha_sigma(self, t: int | Tensor, like: Tensor):
        """alpha, sigma at t. For an int they are floats; for a (B,) LongTensor they are tensors of
        the shape (B, 1, .., 1), of the device and the precision of `like` (B, ...)."""
        if not torch.is_tensor(t):
            return self.alpha[t].item(), self.sigma[t].item()
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha = self.alpha.to(like.device)[t.to(like.device)]
        sigma = self.sigma.to(like.device)[t.to(like.device)]
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x0, noise (B, C, h, w); t an int or a (B,) LongTensor -> z_t (B, C, h, w): DDPM eq. 4"""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise.to(x0)

    def convert_output(self, output: Tensor, z: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """The network's output at (z, t), of any prediction -> x0, eps, both (B, C, h, w)

        Channels beyond those of z are a learned variance: they are left to samplers.ddpm.
        """
        alpha, sigma = self.alpha_sigma(t, z)
        output = output[:, : z.shape[1]]
        if self.prediction == "epsilon":
            return self.limit((z - sigma * output) / alpha), output  # DDPM eq. 15
        if self.prediction == "sample":
            return self.limit(output), (z - alpha * output) / sigma
        # (z, v) is (x0, eps) rotated by atan(rho)
        return self.limit(alpha * z - sigma * output), alpha * output + sigma * z

    def limit(self, x0: Tensor) -> Tensor:
        """x0 within what its model was trained for"""
        if self.threshold:  # Imagen, 2205.11487, section 2.3
            ratio, most = self.threshold
            s = x0.flatten(1).abs().quantile(ratio, dim=1).clamp(1, most).view(-1, 1, 1, 1)
            return x0.clamp(-s, s) / s
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


def draw_timesteps(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """(B,) timesteps, one from each of `batch` equal parts of 0 .. T-1: uniform, with less variance
    than free draws."""
    parts = torch.arange(batch) + torch.rand(batch, generator=generator)
    return (parts / batch * T).long().clamp(max=T - 1)  # float32 rounds 31.9999999 to 32
