"""Figures of lesson 4: the nested masks over time, and a denoising strip for each value of the map."""

import torch

import diffdiff
import samplers
from common.canvas import Canvas
from course.draw.toy import draw_noise, load_toy, read_map, read_picture

PROMPT = "snow at night"
K = 50
MU = 0.0, 0.2, 0.4, 0.6, 0.8


def draw(folder, dark):
    return [draw_masks(folder, dark), draw_strips(folder, dark)]


def run(mu, k=K):
    """An edit of the meadow under mu, (H, W) -> z_0; the z_mix that each step sees; the x0 that it answers"""
    model = load_toy()
    z_init = model.encode_image(read_picture())
    guided = model.denoiser(PROMPT, guidance=7.5)
    seen, answers = {}, {}
    sampler = samplers.make_sampler("ddim", model.schedule, k)

    def denoise(z, t):
        output = guided(z, t)
        i = sampler.timesteps.index(int(t[0]))
        seen[i] = z
        answers[i], _ = model.schedule.convert_output(output, z, int(t[0]))
        return output

    z = diffdiff.differential_diffusion(denoise, z_init, mu, sampler, draw_noise(z_init.shape))
    return z, seen, answers


def draw_masks(folder, dark):
    """Columns of steps: the mask of line 8, z_mix, and what the network takes for the picture"""
    model, mu = load_toy(), read_map()
    z, seen, answers = run(mu)
    last = diffdiff.last_override(diffdiff.down_sample(mu, z.shape[-2:]), K)
    canvas = Canvas(888, 426, dark, scale=1)
    for row, title in enumerate(["mask,\nline 8", "z_mix,\nline 9", "x0 of\nline 10"]):
        canvas.text(62, 94 + 132 * row, title, 13, "rm")
    for column, i in enumerate([1, 10, 20, 30, 40, 49]):
        left = 72 + 136 * column
        canvas.text(left + 64, 15, f"i = {i}, i / k = {i / K:.2f}", 12, "mm")
        canvas.picture((last < i)[0, 0].float(), left, 30, 128, smooth=False)
        canvas.box(left, 30, left + 127, 157, outline=canvas.faint)
        canvas.picture(model.decode(seen[i])[0], left, 162, 128)
        canvas.picture(model.decode(answers[i])[0], left, 294, 128)
    return canvas.save(folder, "lesson4-masks")


def draw_strips(folder, dark):
    """Rows: constant maps; columns: what the network takes for the picture at a step, from the first that is run"""
    model = load_toy()
    shown = 0, 10, 20, 30, 40, 49
    canvas = Canvas(860, 30 + 112 * len(MU), dark, scale=1)
    for column, i in enumerate(shown):
        canvas.text(124 + 112 * column, 15, f"i = {i}", 13, "mm")
    canvas.text(804, 15, "result", 13, "mm")
    for row, value in enumerate(MU):
        top = 30 + 112 * row
        z, _, answers = run(torch.full((1, 1), value).expand(32, 32))
        canvas.text(60, top + 54, f"mu = {value}", 13, "rm")
        for column, i in enumerate(shown):
            if i in answers:
                canvas.picture(model.decode(answers[i])[0], 70 + 112 * column, top, 108)
            else:
                canvas.box(70 + 112 * column, top, 178 + 112 * column, top + 108, outline=canvas.faint)
                canvas.text(124 + 112 * column, top + 54, "skipped", 12, "mm", canvas.faint)
        canvas.picture(model.decode(z)[0], 750, top, 108)
    return canvas.save(folder, "lesson4-strips")
