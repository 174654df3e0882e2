"""DeepFloyd IF: diffusion on pixels, 64 on a side, and then 256 beside an enlarged copy of the first result.

    model = load("IF-I-XL-v1.0", "IF-II-L-v1.0")
    states = model.encode_prompt("snow at night")        # T5 is not needed any more: model.text = None
    picture = picture_to_tensor(original, model.stages[-1].fit(*original.size))
    x = edit(model, states, picture, change_map)

The cascade is that of Imagen: Saharia et al. 2022, arXiv 2205.11487. Both stages edit under the change map, as section
11.3 of Differential Diffusion says. There is no autoencoder: what a white map keeps are the picture's own pixels. (The
third stage only enlarges, by Stable Diffusion's x4 upscaler. It is not here.)
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import diffdiff
import samplers
from checkpoints.configs import schedule_from_json
from checkpoints.parts import load_part, read_latent_side, read_schedule, require_folders
from diffusion import Schedule, T
from models import adm, t5

STEPS, GUIDANCE = (80, 50), (10.0, 4.0)  # of each stage, as Differential Diffusion was released
NOISE_LEVEL = 250  # the timestep to which the enlarged picture is noised, so that the second stage draws anew
NOISING = Schedule("squaredcos_cap_v2")  # by this schedule, in all of its checkpoints


@dataclass
class Stage:
    """One UNet of the cascade."""

    unet: adm.ADM
    schedule: Schedule
    size: int  # pixels along the shorter side

    def fit(self, width, height):
        """A picture's size -> (width, height) at this stage, the longer side a multiple of 8 at the least"""
        scale = self.size / min(width, height)
        return tuple(max(8, round(side * scale / 8) * 8) for side in (width, height))


@dataclass
class DeepFloyd:
    """Both stages, of `load`, frozen and in eval mode."""

    stages: list[Stage]
    text: t5.T5 | None  # None frees its memory, once the prompt is encoded
    tokenizer: t5.Tokenizer

    @torch.no_grad()
    def encode_prompt(self, prompt, negative=""):
        """-> states (2, 77, D), of the negative prompt and of the prompt: what both UNets read"""
        # IF was trained on captions in lower case.
        ids, mask = self.tokenizer([text.lower().strip() for text in (negative, prompt)])
        device = self.text.shared.weight.device
        return self.text(ids.to(device), mask.to(device))


# ----------------------------------------------------------------------------------------------------------------------
# The edit


def make_draws(shape, seeds, stage):
    """What is random in a stage: i -> (N, *shape) standard normal, by the seeds, the stage and i alone"""
    noise = samplers.make_step_noise(shape, seeds)
    return lambda i: noise(stage * 2 * T + i)


def edit_stage(stage, states, picture, change_map, steps, guidance, draw, small=None, callback=None):
    """Differential Diffusion in one stage.

    states      (2, 77, D) of `DeepFloyd.encode_prompt`
    picture     (1 or N, 3, h, w) in [-1, 1], the original
    change_map  (H, W) or (1 or N, 1, H, W), 0 = change, 1 = keep
    draw        of `make_draws`: 0 .. steps - 1 are noise of the steps, the next of the original, the last of `small`
    small       (N, 3, h', w'), the result of the stage before
      ->        (N, 3, h, w) in [-1, 1]
    """
    sampler = samplers.make_sampler("ddpm", stage.schedule, steps)
    noise = draw(steps).to(picture)
    N = len(noise)
    beside = level = None
    if small is not None:
        beside = enlarge(small, picture.shape[-2:], draw(steps + 1))
        level = NOISE_LEVEL
    states = (states if guidance != 1 else states[1:]).repeat_interleave(N, dim=0)
    denoise = adm.make_denoiser(stage.unet, states, guidance, sampler.timesteps, beside, level)
    z_init = picture.expand_as(noise)
    return diffdiff.differential_diffusion(denoise, z_init, change_map, sampler, noise, step_noise=draw,
                                           callback=callback)


@torch.no_grad()
def edit(model, states, picture, change_map, steps=STEPS, guidance=GUIDANCE, seeds=(0,), callback=None):
    """Differential Diffusion in both stages; the map applies to each. Arguments as for `edit_stage`, but for:

    picture          (1, 3, H, W) at the size of the second stage (`Stage.fit`)
    steps, guidance  a number for each stage
    seeds            N numbers, of as many results
      ->             (N, 3, H, W) in [-1, 1]. A white pixel of the map is the picture's, bit for bit
    """
    x = None
    for i, stage in enumerate(model.stages):
        seen = shrink(picture, stage)
        draw = make_draws(seen.shape[1:], list(seeds), i)
        x = edit_stage(stage, states, seen, change_map, steps[i], guidance[i], draw, x, callback)
    return x


def enlarge(small, size, noise):
    """(N, 3, h', w'), size (h, w), noise (N, 3, h, w) -> (N, 3, h, w), what the second stage sees beside z"""
    # The corners of both pictures lie on each other: so it was trained.
    return NOISING.add_noise(F.interpolate(small, size, mode="bilinear", align_corners=True), noise, NOISE_LEVEL)


def shrink(picture, stage):
    """(B, 3, H, W) -> the whole of it at the stage's size; itself, where it has that size"""
    height, width = picture.shape[-2:]
    size = stage.fit(width, height)[::-1]
    if size == (height, width):
        return picture
    return F.interpolate(picture, size, mode="bicubic", antialias=True).clamp(-1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def load(first, second, dtype=None, device="cpu"):
    """Two folders as DeepFloyd published them -> DeepFloyd

    first   of a stage I (IF-I-M, L or XL): unet/, text_encoder/, tokenizer/, scheduler/
    second  of a stage II (IF-II-M or L): unet/, scheduler/
    dtype   as for sd.load. T5 computes in bf16 where the UNets do in fp16, in which it overflows

    FileNotFoundError or ValueError, of one line, for anything else.
    """
    stages = [load_stage(Path(folder), i, dtype, device) for i, folder in enumerate((first, second))]
    folder = Path(first) / "text_encoder"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}: IF reads its prompts with T5. Put the folders text_encoder and "
                                f"tokenizer of any IF-I into {first}")
    text = load_part(folder, "t5", dtype, device)
    if text.shared.weight.dtype == torch.float16:
        text = text.bfloat16()
    for stage, name in zip(stages, (first, second)):
        if stage.unet.config.states != text.config.width:
            raise ValueError(f"{name} reads text of width {stage.unet.config.states}, and the T5 in {first} gives "
                             f"{text.config.width}")
    tokenizer = t5.Tokenizer.load(Path(first) / "tokenizer")
    if tokenizer.size > text.config.vocab_size:
        raise ValueError(f"{first}: its tokenizer is not the T5's, which knows {text.config.vocab_size} symbols only")
    return DeepFloyd(stages, text, tokenizer)


def load_stage(path, number, dtype, device):
    """The folder of stage 0 or 1, of I and II -> Stage"""
    require_folders(path, "a stage of DeepFloyd IF", ["unet"])
    unet = load_part(path / "unet", "adm", dtype, device)
    c = unet.config
    if not (c.text and c.noised == bool(number) and c.in_channels == 3 + 3 * number):
        raise ValueError(f"{path} is not a stage {'I' * (number + 1)} of DeepFloyd IF")
    older = {"steps_offset": 0}  # files do not say it
    schedule = read_schedule(path, read=lambda c: schedule_from_json(older | c))
    return Stage(unet, schedule, read_latent_side(path / "unet", 64 * 4**number))
