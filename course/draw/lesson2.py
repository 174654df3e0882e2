"""Figures of lesson 2: paths of samplers in a world of one number; the toy's picture in few and in many steps."""

import torch

import samplers
from common.canvas import Canvas
from course.checks.lesson2 import two_bumps
from course.draw.toy import draw_noise, load_toy
from diffusion import Schedule

STARTS = -2.0, -1.2, -0.5, -0.1, 0.1, 0.6, 1.3, 2.1
STEPS = 3, 5, 10, 20, 40


def draw(folder, dark):
    return [draw_paths(folder, dark), draw_steps(folder, dark)]


def follow(name, k):
    """-> [(t, z)] of each level, z (8,), from STARTS down"""
    sampler = samplers.make_sampler(name, Schedule(spacing="trailing"), k)
    z = torch.tensor(STARTS, dtype=torch.float64).view(-1, 1, 1, 1)
    path = [(sampler.timesteps[0], z.flatten())]
    after = [*sampler.timesteps[1:], 0]
    samplers.run_sampler(two_bumps, z, sampler, step_noise=samplers.make_step_noise((1, 1, 1), range(8)),
                         callback=lambda i, z: path.append((after[i], z.flatten())))
    return path


def draw_paths(folder, dark):
    canvas = Canvas(780, 300, dark)
    exact = follow("ddim", 1000)
    for column, (name, title) in enumerate([("ddim", "DDIM"), ("dpm++", "DPM-Solver++ (2M)"), ("ddpm", "DDPM")]):
        left = 40 + 255 * column
        place = canvas.axes((left, 40, left + 215, 250), (1000, 0), (-3, 3), "t", "", ticks=5)
        canvas.text(left + 107, 20, f"{title}, 6 steps", 14, "mm")
        for i in range(len(STARTS) if name != "ddpm" else 0):  # whose paths are random
            canvas.line([place(t, z[i].item()) for t, z in exact[::10] + exact[-1:]], canvas.faint, 4)
        path = follow(name, 6)
        for i in range(len(STARTS)):
            points = [place(t, z[i].item()) for t, z in path]
            colour = canvas.lines[i % len(canvas.lines)]
            canvas.line(points, colour, 1.5)
            for point in points:
                canvas.dot(*point, colour, 2.5)
    return canvas.save(folder, "lesson2-paths")


def draw_steps(folder, dark):
    """Rows: two samplers; columns: numbers of steps"""
    model = load_toy()
    denoise = model.denoiser("a red ball on grass at noon", guidance=3)
    noise = draw_noise((1, 8, 32, 32), seed=1)
    canvas = Canvas(752, 294, dark)
    for row, (name, title) in enumerate([("ddim", "DDIM"), ("dpm++", "DPM-\nSolver++")]):
        canvas.text(76, 94 + 132 * row, title, 13, "rm")
        for column, k in enumerate(STEPS):
            sampler = samplers.make_sampler(name, model.schedule, k)
            x = model.decode(samplers.run_sampler(denoise, noise, sampler))[0]
            canvas.picture(x, 84 + 132 * column, 30 + 132 * row, 128)
    for column, k in enumerate(STEPS):
        canvas.text(148 + 132 * column, 15, f"{k} steps", 13, "mm")
    return canvas.save(folder, "lesson2-steps")
