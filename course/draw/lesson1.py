"""Figures of lesson 1: the channels of a latent; noised latents, and what one call of the network makes of them."""

import torch

from common.canvas import Canvas, heat
from course.draw.toy import draw_noise, load_toy, read_picture

TIMESTEPS = 1, 250, 500, 750, 999


def draw(folder, dark):
    return [draw_latent(folder, dark), draw_levels(folder, dark)]


def draw_latent(folder, dark):
    model, x = load_toy(), read_picture()
    z = model.encode_image(x)
    canvas = Canvas(780, 218, dark)
    canvas.text(94, 14, "the picture, 3 x 128 x 128", 13, "mm")
    canvas.picture(x[0], 0, 30, 188)
    canvas.text(390, 14, "its latent, 8 x 32 x 32", 13, "mm")
    for c, channel in enumerate(z[0]):
        canvas.picture(heat(channel, most=3), 210 + 92 * (c % 4), 30 + 100 * (c // 4), 88, smooth=False)
    canvas.text(686, 14, "decoded again", 13, "mm")
    canvas.picture(model.decode(z)[0], 592, 30, 188)
    return canvas.save(folder, "lesson1-latent")


def draw_levels(folder, dark):
    """Columns of timesteps: z_t decoded, and under it the x0 of one call without words"""
    model, x = load_toy(), read_picture()
    z_init = model.encode_image(x)
    noise = draw_noise(z_init.shape)
    t = torch.tensor(TIMESTEPS)
    z = model.schedule.add_noise(z_init, noise, t)
    output = model.denoiser([""] * len(t))(z, t)
    x0 = torch.cat([model.schedule.convert_output(output[i : i + 1], z[i : i + 1], n)[0]
                    for i, n in enumerate(TIMESTEPS)])
    canvas = Canvas(728, 292, dark)
    canvas.text(60, 94, "z_t,\ndecoded", 13, "rm")
    canvas.text(60, 228, "x0, by\none call", 13, "rm")
    for i, n in enumerate(TIMESTEPS):
        left = 68 + 132 * i
        canvas.text(left + 64, 14, f"t = {n}, abar = {model.schedule.abar[n]:.3f}", 11, "mm")
        canvas.picture(model.decode(z[i : i + 1])[0], left, 30, 128)
        canvas.picture(model.decode(x0[i : i + 1])[0], left, 164, 128)
    return canvas.save(folder, "lesson1-noise")
