"""Samplers, as functions on tensors: the reverse process, from noise to a picture.

    sampler = make_sampler("ddim", schedule, k=50)
    z = run_sampler(model, torch.randn(1, 4, 64, 64), sampler)     # text to image
    z = sampler.noise_to(20, z_init, noise)                        # SDEdit at strength 30 / 50
    z = run_sampler(model, z, sampler, start=20)

A `model` is any function (z, t) -> output, z (B, C, h, w), t (B,) long, output like z: the noise or
the velocity that it predicts.

Latents are z = alpha x0 + sigma eps, and rho = sigma / alpha. EDM, whose latents are x0 + rho eps,
is converted inside its two samplers, so a caller never needs to know which sampler it holds.

All samplers walk k timesteps, LCM its own and the others the schedule's, so one ladder of
change-map thresholds i / k serves them all. Step i in 0 .. k-1 takes a latent from level i to level
i+1; it may call the model more than once (Heun, PNDM).

Papers: DDPM 2006.11239, DDIM 2010.02502, PNDM 2202.09778, EDM 2206.00364, DPM-Solver++ 2211.01095,
DEIS 2204.13902, LCM 2310.04378, IDDPM 2102.09672.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion import Schedule, T

# --------------------------------------------------------------------------------------------------
# What all samplers share: the ladder of noise levels, and a memory that knows where it is void


class Ladder:
    """The k + 1 noise levels that k steps visit: k timesteps of the schedule, then `end`, an abar.

    spacing  of the timesteps, as for `Schedule.space_timesteps`; None: the schedule's

    ValueError where the first level has no signal, as at t = 999 of 'zero_snr': rho is infinite.
    """

    def __init__(self, schedule: Schedule, k: int, end: float, spacing: str | None = None):
        self.schedule = schedule
        self.k = k
        self.timesteps = schedule.space_timesteps(k, spacing)
        self.abar = [schedule.abar[t] for t in self.timesteps] + [end]
        if not self.abar[0]:
            raise ValueError(f"{k} steps start at t = {self.timesteps[0]}, where this schedule "
                             "leaves nothing of the picture: take --spacing leading, below 500")
        self.alpha = [math.sqrt(a) for a in self.abar]
        self.sigma = [math.sqrt(1 - a) for a in self.abar]
        # EDM's sigma, DEIS's rho, DPM-Solver's exp(-lambda)
        self.rho = [s / a for s, a in zip(self.sigma, self.alpha)]

    def ask(self, model, z: Tensor, i: int) -> Tensor:
        """One call of the model, of any precision, on z (B, C, h, w) at level i < k -> output"""
        return model(z, torch.full((len(z),), self.timesteps[i], device=z.device)).to(z.dtype)

    def predict(self, model, z: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """One call of the model, as `ask` -> x0, eps (B, C, h, w)"""
        return self.schedule.convert_output(self.ask(model, z, i), z, self.timesteps[i])

    def transfer(self, z: Tensor, eps: Tensor, i: int) -> Tensor:
        """From level i to i+1 along a constant eps: DDIM's step, PNDM's 'transfer part'."""
        scale = self.alpha[i + 1] / self.alpha[i]
        return scale * z + (self.sigma[i + 1] - scale * self.sigma[i]) * eps


class History(NamedTuple):
    """What a multi-step sampler remembers between steps, pixel by pixel."""

    past: list[Tensor]  # the last prediction m, its differences dm, ddm, .., each (B, C, h, w)
    age: Tensor  # how many past predictions are valid: int, (B or 1, 1, h, w), or () at first


def take_differences(m: Tensor, history: History | None, restarted: Tensor | None, order: int):
    """Backward differences of the predictions, zero where the past that they need is void.

    Every multi-step method here is its one-step method plus corrections by differences, so a zero
    difference *is* the lower order. A pixel whose latent was just replaced (`restarted`) has no
    past: what the chain predicted there before belongs to a latent that was thrown away. It goes on
    as a chain that starts at this very step does. So a constant change map equals SDEdit, whatever
    the sampler.

    m (B, C, h, w), the prediction at this step; restarted (B or 1, 1, h, w) bool or None
      -> [dm, ddm, ..], at most order - 1 of them
         void, bool like age, True where there is no past
         the new History
    """
    past, age = history or History([], torch.zeros((), dtype=torch.long, device=m.device))
    if restarted is not None:
        age = torch.where(restarted.to(m.device), 0, age)
    diffs = [m]
    for j, old in enumerate(past[: order - 1]):
        # d^(j+1) m = d^j m - d^j m_previous, from j + 1 past predictions
        diffs.append(torch.where(age > j, diffs[j] - old, 0.0))
    return diffs[1:], age == 0, History(diffs, age + 1)


@dataclass(frozen=True)
class Sampler:
    """A sampler for one schedule and one number of steps. The state of a run is passed along.

    step(model, z, i, state=None, noise=None, restarted=None) -> z, state
        One step from level i to level i+1, 0 <= i < k. z (B, C, h, w), best in float32.
        state      what the last step returned; None where a chain starts, at whatever i
        noise      (B, C, h, w) standard normal, for this step; only a `stochastic` sampler reads it
        restarted  (B or 1, 1, h, w) bool: pixels of z that are not the last step's result, because
                   Algorithm 1 of Differential Diffusion overwrote them. None: there are none. A
                   pixel that will be overwritten again before the next step may be left out: its
                   result is thrown away
    """

    ladder: Ladder
    step: Callable
    stochastic: bool = False

    @property
    def k(self) -> int:
        return self.ladder.k

    @property
    def timesteps(self) -> list[int]:
        """The k timesteps, falling: step i sees the model at timesteps[i]."""
        return self.ladder.timesteps

    def noise_to(self, i: int, z_init: Tensor, noise: Tensor) -> Tensor:
        """The original, noised to the level that step i < k expects; all (B, C, h, w)"""
        return self.ladder.schedule.add_noise(z_init, noise, self.timesteps[i])


# --------------------------------------------------------------------------------------------------
# One-step samplers


def require_noise(noise: Tensor | None, z: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("this sampler is stochastic: pass noise, as make_step_noise draws it")
    return noise.to(z)


def ddpm(schedule: Schedule, k: int) -> Sampler:
    """Ancestral sampling. Its variance is the posterior's or the network's own. Stochastic."""
    ladder = Ladder(schedule, k, end=1.0)
    constants = []
    for abar, abar_next in zip(ladder.abar, ladder.abar[1:]):
        a = abar / abar_next  # the papers' alpha_t, of a step that spans several timesteps
        c_x0 = math.sqrt(abar_next) * (1 - a) / (1 - abar)
        c_z = math.sqrt(a) * (1 - abar_next) / (1 - abar)
        beta_tilde = (1 - abar_next) / (1 - abar) * (1 - a)
        constants.append((c_x0, c_z, beta_tilde, 1 - a))

    def step(model, z, i, state=None, noise=None, restarted=None):
        output = ladder.ask(model, z, i)
        x0, _ = schedule.convert_output(output, z, ladder.timesteps[i])
        c_x0, c_z, least, most = constants[i]
        std = math.sqrt(least)
        if output.shape[1] > z.shape[1] and i + 1 < k:  # learned, but for the last step's: 0
            v = (output[:, z.shape[1] :] + 1) / 2
            std = (v * math.log(most) + (1 - v) * math.log(least)).div(2).exp()  # IDDPM, eq. 15
        return c_x0 * x0 + c_z * z + std * require_noise(noise, z), None  # eq. 7

    return Sampler(ladder, step, stochastic=True)


def ddim(schedule: Schedule, k: int, eta: float = 0.0) -> Sampler:
    """eta = 0 is deterministic, eta = 1 as random as DDPM. ValueError for an eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], not {eta}")
    # Stable Diffusion ends at the first level, not at zero noise.
    ladder = Ladder(schedule, k, end=schedule.abar[0])
    std = []
    direction = []
    for abar, abar_next in zip(ladder.abar, ladder.abar[1:]):
        std_i = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))  # eq. 16
        std.append(std_i)
        direction.append(math.sqrt(1 - abar_next - std_i**2))

    def step(model, z, i, state=None, noise=None, restarted=None):
        x0, eps = ladder.predict(model, z, i)
        z = ladder.alpha[i + 1] * x0 + direction[i] * eps  # eq. 12
        if eta:
            z = z + std[i] * require_noise(noise, z)
        return z, None

    return Sampler(ladder, step, stochastic=eta > 0)


def lcm(schedule: Schedule, k: int) -> Sampler:
    """A latent consistency model's, mostly in 4 steps: to x0, and in new noise to the next level.
    Stochastic. ValueError for more than 50 steps.
    """
    ladder = Ladder(schedule, k, end=1.0, spacing="lcm")

    def step(model, z, i, state=None, noise=None, restarted=None):
        x0, _ = ladder.predict(model, z, i)
        # f(z, t) of eq. 9: at t = 0 it is z itself. Sigma_data is 1/2; the release multiplies t by
        # 10, so that c_skip is next to nothing at all other t.
        t = 10 * ladder.timesteps[i]
        f = 0.25 / (t**2 + 0.25) * z + t / math.sqrt(t**2 + 0.25) * x0
        return ladder.alpha[i + 1] * f + ladder.sigma[i + 1] * require_noise(noise, z), None

    return Sampler(ladder, step, stochastic=True)


def euler(schedule: Schedule, k: int) -> Sampler:
    """EDM's ODE by Euler's method. It is DDIM at eta = 0, but for ending at zero noise."""
    ladder = Ladder(schedule, k, end=1.0)

    def step(model, z, i, state=None, noise=None, restarted=None):
        x = z / ladder.alpha[i]  # into EDM's space
        _, d = ladder.predict(model, z, i)  # dx/drho = (x - x0) / rho = eps: algorithm 1, line 4
        x = x + (ladder.rho[i + 1] - ladder.rho[i]) * d  # line 5
        return ladder.alpha[i + 1] * x, None  # and back

    return Sampler(ladder, step)


def heun(schedule: Schedule, k: int) -> Sampler:
    """EDM's algorithm 1: an Euler step, then the mean of the slopes at both ends.

    It calls the model twice a step, and once in the last.
    """
    ladder = Ladder(schedule, k, end=1.0)

    def step(model, z, i, state=None, noise=None, restarted=None):
        x = z / ladder.alpha[i]  # into EDM's space
        h = ladder.rho[i + 1] - ladder.rho[i]
        _, d = ladder.predict(model, z, i)  # line 4
        x_next = x + h * d  # line 5
        if i + 1 < k:  # line 6: there is no slope at zero noise
            z_next = ladder.alpha[i + 1] * x_next
            _, d_next = ladder.predict(model, z_next, i + 1)  # line 7
            x_next = x + h * (d + d_next) / 2  # line 8
        return ladder.alpha[i + 1] * x_next, None

    return Sampler(ladder, step)


# --------------------------------------------------------------------------------------------------
# Multi-step samplers: one model call a step, better for remembering the calls before


def pndm(schedule: Schedule, k: int) -> Sampler:
    """PNDM as Stable Diffusion uses it (PLMS): fourth-order Adams-Bashforth on eps, no Runge-Kutta.

    A pixel without a past starts with the pseudo improved Euler step, which costs a second model
    call. diffusers counts that call as a step of its own (k + 1 in all). Here it belongs to the
    step that needs it: a restarted pixel warms up as well, and a step in which any pixel restarts
    costs two calls. The last step has no next timestep to look at and goes without.
    """
    ladder = Ladder(schedule, k, end=schedule.abar[0])

    def step(model, z, i, state=None, noise=None, restarted=None):
        _, eps = ladder.predict(model, z, i)
        diffs, void, state = take_differences(eps, state, restarted, order=4)
        # Eq. 12, (55 e - 59 e' + 37 e'' - 9 e''') / 24, in differences: cut after any term it is
        # the lower order's (3 e - e') / 2 and (23 e - 16 e' + 5 e'') / 12. The past is kept as eps
        # also for a network that predicts v, since eps is what the transfer holds constant
        # (diffusers extrapolates v itself, and loses the order by it).
        eps_prime = eps
        for c, d in zip((1 / 2, 5 / 12, 3 / 8), diffs):
            eps_prime = eps_prime + c * d
        z_next = ladder.transfer(z, eps_prime, i)
        if i + 1 < k and void.any():
            _, eps_next = ladder.predict(model, z_next, i + 1)
            z_next = torch.where(void, ladder.transfer(z, (eps + eps_next) / 2, i), z_next)
        return z_next, state

    return Sampler(ladder, step)


def dpmpp(schedule: Schedule, k: int) -> Sampler:
    """DPM-Solver++ (2M): second order, on x0. lambda = log(alpha / sigma), h = its step."""
    ladder = Ladder(schedule, k, end=1.0)
    # D = x0 + dx0 / (2 r), r = h_previous / h. The last step, whose h is infinite, is first order.
    lam = [-math.log(rho) for rho in ladder.rho[:-1]]
    half_inverse_r = [0.0] * k
    for i in range(1, k - 1):
        half_inverse_r[i] = (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) / 2

    def step(model, z, i, state=None, noise=None, restarted=None):
        x0, _ = ladder.predict(model, z, i)
        diffs, _, state = take_differences(x0, state, restarted, order=2)
        D = x0 + half_inverse_r[i] * diffs[0] if diffs else x0  # algorithm 2, D_i
        exp_minus_h = ladder.rho[i + 1] / ladder.rho[i]
        kept = ladder.sigma[i + 1] / ladder.sigma[i] * z
        return kept - ladder.alpha[i + 1] * (exp_minus_h - 1) * D, state

    return Sampler(ladder, step)


def deis(schedule: Schedule, k: int) -> Sampler:
    """DEIS of second order: eps is a line in log(rho) through the last two calls, integrated."""
    ladder = Ladder(schedule, k, end=schedule.abar[0])
    # The weight of deps: log(rho / rho_i) / log(rho_i / rho_previous), integrated over rho from
    # level i to level i+1; what is left of the paper's C_i0, C_i1 (eq. 15) sums to the transfer. A
    # run of few steps ends at first order, as in diffusers: so large a last step is not to be
    # extrapolated.
    weight = [0.0] * k
    for i in range(1, k if k >= 15 else k - 1):
        previous, now, after = ladder.rho[i - 1 : i + 2]
        integral = after * (math.log(after / now) - 1) + now
        weight[i] = ladder.alpha[i + 1] * integral / math.log(now / previous)

    def step(model, z, i, state=None, noise=None, restarted=None):
        _, eps = ladder.predict(model, z, i)
        diffs, _, state = take_differences(eps, state, restarted, order=2)
        z = ladder.transfer(z, eps, i)  # eq. 14, with the past equal to the present
        if diffs:
            z = z + weight[i] * diffs[0]
        return z, state

    return Sampler(ladder, step)


# --------------------------------------------------------------------------------------------------
# The loop, its inverse, and the table


def make_step_noise(shape: tuple, seeds: list[int]) -> Callable[[int], Tensor]:
    """Noise for a stochastic sampler: step i -> (B, *shape) standard normal, B = len(seeds)

    It depends on (seed, i) alone, and is drawn on the CPU: a picture is the same in any batch, on
    any device, and from any starting step.
    """

    def step_noise(i: int) -> Tensor:
        draws = []
        for seed in seeds:
            generator = np.random.default_rng((seed, i))
            draws.append(generator.standard_normal(shape, dtype=np.float32))
        return torch.from_numpy(np.stack(draws))

    return step_noise


@torch.no_grad()
def run_sampler(
    model, z: Tensor, sampler: Sampler, start: int = 0, step_noise=None, callback=None
) -> Tensor:
    """The reverse process: from noise, text to image; from a noised original and start > 0, SDEdit.

    model       (z, t) -> the network's output, t (B,) long
    z           (B, C, h, w) at the level of step `start`: torch.randn, or of `noise_to`
    step_noise  i -> (B, C, h, w), for a stochastic sampler: make_step_noise(z.shape[1:], seeds)
    callback    called as callback(i, z) with the result of step i
      ->        (B, C, h, w), the clean latent; z itself where start = k
    ValueError for a start outside 0 .. k.
    """
    if not 0 <= start <= sampler.k:
        raise ValueError(f"start must lie in 0 .. {sampler.k} (the number of steps), not {start}")
    state = None
    for i in range(start, sampler.k):
        noise = step_noise(i) if step_noise and sampler.stochastic else None
        z, state = sampler.step(model, z, i, state, noise)
        if callback:
            callback(i, z)
    return z


@torch.no_grad()
def invert_ddim(model, z: Tensor, sampler: Sampler, start=0, rounds=1) -> list[Tensor]:
    """DDIM backwards, `transfer` solved for z: the latents of levels start .. k on the way to z.

    rounds  1: a latent's noise is asked of the next cleaner one, as in all papers; more: of guesses
    """
    ladder, levels = sampler.ladder, [z]
    for i in reversed(range(start, ladder.k)):
        scale = ladder.alpha[i + 1] / ladder.alpha[i]
        guess = levels[0]
        for _ in range(rounds):
            _, eps = ladder.predict(model, guess, i)
            guess = (levels[0] - (ladder.sigma[i + 1] - scale * ladder.sigma[i]) * eps) / scale
        levels.insert(0, guess)
    return levels


SAMPLERS = {  # name: (schedule, k, options) -> Sampler
    "ddpm": ddpm,
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "heun": heun,
    "dpm++": dpmpp,
    "deis": deis,
    "lcm": lcm,
}


def make_sampler(name: str, schedule: Schedule, k: int, **options) -> Sampler:
    """A sampler by name, for k steps, 1 <= k <= T, else ValueError. An option is ddim's eta."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    if not 1 <= k <= T:
        raise ValueError(f"the number of steps must lie in 1 .. {T}, not {k}")
    return SAMPLERS[name](schedule, k, **options)
