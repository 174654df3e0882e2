"""Sheets of pictures and charts of numbers, drawn with Pillow, for the page that -m reproduce writes."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.pictures import tensor_to_picture

INK, FAINT, LINES = "#222222", "#d5d5d5", ("#0b62a4", "#c8501e", "#2a8a4a")
SCALE = 2  # charts are drawn at twice the size that they are shown at


def to_picture(x):
    """(3, H, W) in [-1, 1], or a map (H, W) in [0, 1] -> picture"""
    if not isinstance(x, torch.Tensor):
        return x
    return tensor_to_picture(x / 2 + 0.5 if x.ndim == 3 else x[None])


def heat(x):
    """(H, W) -> picture: grey, black the least, white the largest"""
    x = x.double()
    return to_picture((x - x.min()) / (x.max() - x.min()).clamp(min=1e-12))


def break_lines(text, font, width):
    """text -> lines that fit the width, broken at spaces; a single longer word is cut short."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    for i, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 2:
            line = line[:-3] + ".."
        lines[i] = line
    return lines


def sheet(rows, columns=None, labels=None, cell=128, gap=3):
    """Pictures in rows and columns on white.

    rows     lists of pictures, or of what `to_picture` takes, each drawn `cell` pixels wide; None leaves a blank
    columns  texts over the columns, and labels: texts at the left of the rows; broken at spaces. None: none
    """
    font = ImageFont.load_default(12)
    rows = [[to_picture(x) for x in row] for row in rows]
    heads = [break_lines(text, font, cell) for text in columns or []]
    sides = [break_lines(text, font, 96) for text in labels or []]
    top = 15 * max(map(len, heads), default=0) + (4 if heads else 0)
    left = (max(round(font.getlength(line)) for lines in sides for line in lines) + 8) if sides else 0
    heights = [max(round(p.height * cell / p.width) for p in row if p) for row in rows]
    width = left + max(map(len, rows)) * (cell + gap) - gap
    out = Image.new("RGB", (width, top + sum(heights) + gap * (len(rows) - 1)), "white")
    draw = ImageDraw.Draw(out)
    for j, lines in enumerate(heads):
        draw.multiline_text((left + j * (cell + gap) + cell / 2, top - 4), "\n".join(lines), INK, font, anchor="md",
                            align="center", spacing=3)
    y = top
    for i, row in enumerate(rows):
        if sides:
            draw.multiline_text((left - 6, y + heights[i] / 2), "\n".join(sides[i]), INK, font, anchor="rm",
                                align="right", spacing=3)
        for j, picture in enumerate(row):
            if picture:
                shape = cell, round(picture.height * cell / picture.width)
                fitted = picture if picture.size == shape else picture.resize(shape, Image.Resampling.LANCZOS)
                out.paste(fitted, (left + j * (cell + gap), y))
        y += heights[i] + gap
    return out


def chart(series, x_label, y_label):
    """{name: (x, y)}, dots if the name is "measured" and a line otherwise; y from 0 -> picture, twice 560x340"""
    font, small = ImageFont.load_default(13 * SCALE), ImageFont.load_default(12 * SCALE)
    width, height = 560 * SCALE, 340 * SCALE
    left, right, top, bottom = 62 * SCALE, width - 14 * SCALE, 30 * SCALE, height - 46 * SCALE  # of the axes
    xs, ys = (np.concatenate([s[i] for s in series.values()]) for i in (0, 1))
    x_span, y_span = xs.max() - xs.min(), 1.1 * ys.max()

    def place(x, y):
        return left + (x - xs.min()) / x_span * (right - left), bottom - y / y_span * (bottom - top)

    # The grid and its numbers; what the axes are.
    out = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(out)
    for share in np.linspace(0, 1, 6):
        x, y = xs.min() + share * x_span, share * y_span
        across, up = place(x, y)
        draw.line([(across, bottom), (across, top)], FAINT, SCALE)
        draw.text((across, bottom + 5 * SCALE), f"{x:.3g}", INK, small, anchor="mt")
        draw.line([(left, up), (right, up)], FAINT, SCALE)
        draw.text((left - 6 * SCALE, up), f"{y:.3g}", INK, small, anchor="rm")
    draw.text(((left + right) / 2, height - 4 * SCALE), x_label, INK, font, anchor="md")
    draw.text((4 * SCALE, 4 * SCALE), y_label, INK, font)

    # The lines, and above them their names.
    name_x = left + font.getlength(y_label)
    for colour, (name, (x, y)) in zip(LINES, series.items()):
        points = [place(*p) for p in zip(x, y)]
        if name == "measured":
            for px, py in points:
                draw.ellipse([px - 7, py - 7, px + 7, py + 7], colour)
        else:
            draw.line(points, colour, 2 * SCALE, joint="curve")
        draw.line([(name_x, 15 * SCALE), (name_x + 18 * SCALE, 15 * SCALE)], colour, 3 * SCALE)
        draw.text((name_x + 24 * SCALE, 15 * SCALE), name, INK, small, anchor="lm")
        name_x += small.getlength(name) + 40 * SCALE
    return out
