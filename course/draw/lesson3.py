"""Figures of lesson 3: which vectors a word changes; where the words are looked up; a sweep of the guidance."""

import torch

import samplers
from common.canvas import Canvas, heat
from course.draw.toy import draw_noise, load_toy, read_picture, watch_attention

PROMPT = "a purple mushroom on sand at sunset"
WEIGHTS = 0, 1, 3, 7.5, 15
SEEDS = 3, 5


def draw(folder, dark):
    return [draw_causal(folder, dark), draw_words(folder, dark), draw_guidance(folder, dark)]


def draw_causal(folder, dark):
    """Rows: prompts in which one word is another; columns: how far each vector moves"""
    model = load_toy()
    words = ["start", *"a red ball on snow at night".split(), "end", "pad", "pad", "pad"]
    changes = ["a blue ball on snow at night", "a red ball on sand at night", "a red ball on snow at noon"]
    one, *others = model.encode_prompt(["a red ball on snow at night", *changes])
    canvas = Canvas(780, 170, dark)
    for column, word in enumerate(words):
        canvas.text(232 + 46 * column, 20, word, 12, "mm")
    for row, (other, text) in enumerate(zip(others, changes)):
        canvas.text(200, 52 + 44 * row, text, 12, "rm")
        moved = (one - other).square().mean(-1).sqrt()
        for column in range(len(words)):
            canvas.picture(heat(moved[column].view(1, 1), most=1), 210 + 46 * column, 32 + 44 * row, 44, smooth=False)
            canvas.box(210 + 46 * column, 32 + 44 * row, 254 + 46 * column, 76 + 44 * row, outline=canvas.paper)
    return canvas.save(folder, "lesson3-causal")


def look_up(model, prompt, z, t):
    """-> (77, 16, 16): how much each place looks at each token, mean over heads and the blocks of 16 x 16"""
    found = watch_attention(model.unet, lambda: model.unet(z, t, model.encode_prompt(prompt)))
    fine = [weights for weights in found.values() if len(weights) == 16 * 16]
    return torch.stack(fine).mean(0).T.reshape(-1, 16, 16)


def draw_words(folder, dark):
    model, x = load_toy(), read_picture()
    z = model.encode_image(x)
    z_t = model.schedule.add_noise(z, draw_noise(z.shape), 500)
    words = "a yellow house and a green tree and a red ball on grass at noon".split()
    maps = look_up(model, " ".join(words), z_t, torch.tensor([500]))
    shown = ["house", "tree", "red", "ball", "grass", "noon"]
    canvas = Canvas(780, 134, dark)
    canvas.picture(x[0], 0, 26, 106)
    for i, word in enumerate(shown):
        m = maps[words.index(word) + 1]
        canvas.text(165 + 112 * i, 13, word, 13, "mm")
        canvas.picture((m - m.min()) / (m.max() - m.min()), 112 + 112 * i, 26, 106)
    return canvas.save(folder, "lesson3-words")


def draw_guidance(folder, dark):
    """Rows: seeds; columns: w"""
    model = load_toy()
    noise = torch.cat([draw_noise((1, 8, 32, 32), seed) for seed in SEEDS])
    sampler = samplers.make_sampler("ddim", model.schedule, 25)
    canvas = Canvas(664, 294, dark)
    for column, w in enumerate(WEIGHTS):
        denoise = model.denoiser([PROMPT if w else ""] * len(SEEDS), guidance=w or 1)
        canvas.text(68 + 132 * column, 15, "without words" if w == 0 else f"w = {w}", 13, "mm")
        for row, z in enumerate(samplers.run_sampler(denoise, noise, sampler)):
            canvas.picture(model.decode(z[None])[0], 4 + 132 * column, 30 + 132 * row, 128)
    return canvas.save(folder, "lesson3-guidance")
