"""The forward process: how much noise there is at each timestep.

    schedule = Schedule("scaled_linear")
    z_t = schedule.add_noise(x0, noise, t)

A latent at level abar, in Stable Diffusion's own (variance preserving) space, is

    z = sqrt(abar) x0 + sqrt(1 - abar) eps                                             DDPM eq. 4

and alpha = sqrt(abar), sigma = sqrt(1 - abar) throughout. samplers.py walks back from noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

T = 1000  # training timesteps, in every model that this project reads


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """betas (T,) -> betas whose last step leaves nothing of the picture: 2305.08891, algorithm 1"""
    alpha = (1 - betas).cumprod(dim=0).sqrt()
    # It ends at 0 and begins where it began.
    abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - abar / F.pad(abar[:-1], (1, 0), value=1.0)


# beta_t, t = 0 .. T-1 (the papers' t = 1 .. T): Stable Diffusion's, DDPM's and the text of Magic
# Fixup's, and what Magic Fixup's release trains and samples with.
BETAS = {
    "scaled_linear": torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2,
    "linear": torch.linspace(1e-4, 0.02, T, dtype=torch.float64),
}
BETAS["zero_snr"] = zero_terminal_snr(BETAS["scaled_linear"])


class Schedule:
    """How much noise there is at each timestep, and what the network was trained to say about it.

    name        'scaled_linear' (Stable Diffusion), 'linear' (DDPM) or 'zero_snr' (the first, to no
                signal at all)
    prediction  'epsilon' (the noise) or 'v_prediction' (alpha eps - sigma x0: Progressive
                Distillation, 2202.00512)

    .alphas_cumprod  (T,) float32, abar at t = 0 .. T-1

    ValueError for an unknown name or prediction.
    """

    def __init__(self, name: str = "scaled_linear", prediction: str = "epsilon"):
        if name not in BETAS:
            raise ValueError(f"unknown noise schedule {name!r}: choose one of {', '.join(BETAS)}")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"the prediction is epsilon or v_prediction, not {prediction!r}")
        self.name = name
        self.prediction = prediction
        abar = torch.cumprod(1 - BETAS[name], dim=0)  # float64: 1 - abar cancels badly near t = 0
        self.abar = abar.tolist()  # for the samplers' scalars
        self.alphas_cumprod = abar.float()
        self.alpha = abar.sqrt().float()  # (T,)
        self.sigma = (1 - abar).sqrt().float()

    def alpha_sigma(self, t: int | Tensor, like: Tensor):
        """alpha, sigma at t: floats for an int, (B, 1, 1, 1) as `like` is for a (B,) LongTensor"""
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
        """The network's output at (z, t), of either prediction -> x0, eps, both (B, C, h, w)"""
        alpha, sigma = self.alpha_sigma(t, z)
        if self.prediction == "epsilon":
            return (z - sigma * output) / alpha, output  # DDPM eq. 15
        # (z, v) is (x0, eps) rotated by atan(rho)
        return alpha * z - sigma * output, alpha * output + sigma * z
