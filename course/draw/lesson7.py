"""Lesson 7's figures: both UNets with their live shapes, where one query looks, what the reference is for."""

import torch
from PIL import ImageFont

import diffdiff
from common.canvas import Canvas, heat, to_picture
from course.draw.toy import draw_noise, load_toy_mfx, watch_attention
from reproduce.mfx_tables import fix_up, make_user_edits

EDITS = 8  # held-out scenes, each with one object edited


def draw(folder, dark):
    return [draw_networks(folder, dark), draw_attention(folder, dark), draw_references(folder, dark)]


def find_stages(unet):
    """-> [(name, the module whose output leaves this stage, its transformer blocks)], from left to right"""
    stages = [("in", unet.conv_in, [])]
    for kind in ("down", "up"):
        for i, level in enumerate(getattr(unet, f"{kind}_blocks")):
            steps = [step["conv"] for step in (*level.downsamplers, *level.upsamplers)]
            last = [*level.resnets, *level.attentions, *steps][-1]
            blocks = [b for a in level.attentions for b in a.transformer_blocks]
            stages.append((f"{kind} {i}", last, blocks))
        if kind == "down":
            stages.append(("middle", unet.mid_block, list(unet.mid_block.attentions[0].transformer_blocks)))
    return [*stages, ("out", unet.conv_out, [])]


def watch(model, run):
    """Run, and record what goes through -> {module: shape of its output}, {module: shape of its first input}"""
    out, into, hooks = {}, {}, []
    for module in model.modules():
        def record(module, inputs, output):
            if torch.is_tensor(output):
                out[module], into[module] = tuple(output.shape[1:]), tuple(inputs[0].shape[1:])
        hooks.append(module.register_forward_hook(record))
    run()
    for hook in hooks:
        hook.remove()
    return out, into


def draw_networks(folder, dark):
    """Every number is read off the model while it runs."""
    model = load_toy_mfx()
    C, side = model.vae.config.latent_channels, model.size // model.vae.config.factor
    z, M = torch.zeros(1, C, side, side), torch.ones(1, 1, side, side)
    out, into = watch(model, lambda: model(z, torch.tensor([500]), z, z, M, z))
    canvas = Canvas(900, 452, dark)
    boxes = {}
    networks = (("detail extractor", "I_t, I, M", model.extractor),
                ("synthesizer", "x_t, I_coarse, M", model.synthesizer))
    for row, (name, inputs, unet) in enumerate(networks):
        middle, colour = 120 + 212 * row, canvas.lines[row]
        canvas.text(14, middle - 88, name, 16, "lm", colour)
        canvas.text(14, middle - 8, inputs, 13, "lm")
        canvas.text(14, middle + 12, "x".join(map(str, into[unet.conv_in])), 13, "lm")
        stages = find_stages(unet)
        for j, (stage, module, blocks) in enumerate(stages):
            x, (channels, h, w) = 130 + 84 * j, out[module]
            tall = 22 + 1.5 * h
            canvas.box(x, middle - tall, x + 70, middle + tall, outline=colour, width=2, radius=6)
            first = middle + (tall - 30 if row else 12 - tall)
            canvas.text(x + 35, first, stage, 12, "mm")
            canvas.text(x + 35, first + 17, f"{channels}x{h}x{w}", 12, "mm")
            if j:
                canvas.arrow((x - 13, middle), (x - 1, middle), canvas.ink, 1.5)
            for k, block in enumerate(blocks):
                place = x + 35 + 26 * (k - (len(blocks) - 1) / 2), middle + (-14 if row else 14)
                boxes.setdefault(row, []).append((block, place))
    for i, ((block, top), (_, bottom)) in enumerate(zip(boxes[0], boxes[1])):
        tokens, width = into[block]
        canvas.arrow((top[0], top[1] + 9), (bottom[0], bottom[1] - 10), canvas.lines[2], 1.5)
        beside = i + 1 < len(boxes[0]) and boxes[0][i + 1][1][0] - top[0] < 40  # of the same stage, and the same shape
        if not beside:
            canvas.text(top[0] + 6, 238, f"{tokens} x {width}", 11, "lm", canvas.lines[2])
    for row, places in boxes.items():
        for block, (x, y) in places:
            canvas.dot(x, y, canvas.lines[row], 8)
            canvas.text(x, y, str(block.index), 11, "mm", canvas.paper)
    note = "boxes: what leaves each stage, resized last. Circles: transformer blocks. Green: features f, tokens x width"
    canvas.text(886, 446, note, 12, "rd")
    return canvas.save(folder, "lesson7-networks")


def look_up(model, edits, which, t):
    """What every query of one edit finds -> {number of the block: (N, N) mean over the heads}"""
    reference, coarse = (model.encode_image(edits[name][which : which + 1] * 2 - 1) for name in ("reference", "coarse"))
    mask = diffdiff.down_sample(edits["mask"][which : which + 1], coarse.shape[-2:])
    x_t = model.schedule.add_noise(coarse, draw_noise(coarse.shape, 0), t)
    inputs = x_t, torch.tensor([t]), reference, coarse, mask, draw_noise(coarse.shape, 1)
    return watch_attention(model.synthesizer, lambda: model(*inputs))


def write_on(canvas, left, top, text, size):
    """White letters on a dark strip, which can be read on any picture; left, top: the strip's corner"""
    wide = canvas.draw.textlength(text, ImageFont.load_default(size * canvas.zoom)) / canvas.zoom
    canvas.box(left, top, left + wide + 6, top + size + 5, fill="#16181d")
    canvas.text(left + 3, top + (size + 5) / 2, text, size, "lm", "#ffffff")


def draw_attention(folder, dark):
    """Two places of one edit, and where in the reference each of them looks."""
    model, edits = load_toy_mfx(), make_user_edits(EDITS)
    which = edits["verb"].index("duplicate")
    found = look_up(model, edits, which, 501)
    fine = [i for i, weights in found.items() if len(weights) == max(map(len, found.values()))]
    size, side = model.size, round(len(found[fine[0]]) ** 0.5)
    y, x = (edits["object"][which].nonzero().double().mean(0) / size * side).long().tolist()
    queries = {"the copy": (y, x), "the sky": (1, side // 2)}
    wide = 112  # of a picture
    canvas = Canvas(20 + (wide + 6) * (2 + len(fine)) + 10, 32 + (wide + 8) * len(queries), dark)
    heads = ["query, in pink", "reference", *(f"block {i}" for i in fine)]
    for j, head in enumerate(heads):
        canvas.text(16 + (wide + 6) * j + wide / 2, 16, head, 13, "mm")
    for row, (name, (v, u)) in enumerate(queries.items()):
        top = 30 + (wide + 8) * row
        for j, shown in enumerate(("coarse", "reference")):
            canvas.picture(edits[shown][which] * 2 - 1, 16 + (wide + 6) * j, top, wide)
        cell = wide / side
        corner = 16 + cell * u, top + cell * v
        canvas.box(*corner, corner[0] + cell, corner[1] + cell, outline="#ff00c8", width=2.5)
        for j, index in enumerate(fine):
            weights = found[index][v * side + u].view(side, side)
            left = 16 + (wide + 6) * (2 + j)
            lit = torch.nn.functional.interpolate((weights / weights.max())[None, None], (size, size))[0, 0]
            grey = edits["reference"][which].mean(0, keepdim=True).expand(3, -1, -1) * 0.6
            orange = torch.tensor([1.0, 0.45, 0.1])[:, None, None]
            canvas.picture(torch.lerp(grey, orange.expand_as(grey), 0.85 * lit) * 2 - 1, left, top, wide)
            top_share = weights.flatten().topk(side).values.sum()
            write_on(canvas, left, top + wide - 15, f"{top_share:.0%} on {side} of {side**2}", 10)
        write_on(canvas, 16, top, name, 11)
    return canvas.save(folder, "lesson7-attention")


def draw_references(folder, dark):
    """Edits through the model: with their own reference, and with another edit's."""
    model, edits = load_toy_mfx(), make_user_edits(EDITS)
    which = [edits["verb"].index(verb) for verb in ("move", "scale", "duplicate", "delete") if verb in edits["verb"]]
    some = {name: edits[name][which] for name in ("reference", "coarse", "mask", "truth")}
    own = fix_up(model, some, 25)
    others = fix_up(model, some | {"reference": some["reference"].roll(1, 0)}, 25)
    columns = {"reference": some["reference"], "coarse edit": some["coarse"], "output": own,
               "another reference": others, "difference": own - others, "truth": some["truth"]}
    wide = 104  # of a picture
    canvas = Canvas(16 + (wide + 6) * len(columns) + 10, 32 + (wide + 8) * len(which), dark)
    for j, (head, pictures) in enumerate(columns.items()):
        left = 16 + (wide + 6) * j
        canvas.text(left + wide / 2, 16, head, 12, "mm")
        for i, picture in enumerate(pictures):
            top = 30 + (wide + 8) * i
            shown = heat(picture.mean(0), 0.3) if head == "difference" else to_picture(picture * 2 - 1)
            canvas.picture(shown, left, top, wide)
            if head in ("coarse edit", "output", "another reference"):
                error = (picture - some["truth"][i]).square().mean() * 1000
                write_on(canvas, left, top + wide - 16, f"error {error:.2f}", 11)
    return canvas.save(folder, "lesson7-references")
