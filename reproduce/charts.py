"""Sheets of pictures and charts of numbers, drawn with Pillow, for the page that -m reproduce writes."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.canvas import Canvas, to_picture

INK = "#222222"


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
    canvas = Canvas(560, 340)
    xs, ys = (np.concatenate([s[i] for s in series.values()]) for i in (0, 1))
    place = canvas.axes((62, 30, 546, 294), (xs.min(), xs.max()), (0, 1.1 * ys.max()), x_label, y_label, ticks=6)

    # The lines, and above them their names.
    small = ImageFont.load_default(12)
    name_x = 74 + small.getlength(y_label)
    for colour, (name, (x, y)) in zip(canvas.lines, series.items()):
        points = [place(*p) for p in zip(x, y)]
        if name == "measured":
            for point in points:
                canvas.dot(*point, colour, 3.5)
        else:
            canvas.line(points, colour)
        canvas.line([(name_x, 17), (name_x + 18, 17)], colour, 3)
        canvas.text(name_x + 24, 17, name, 12, "lm")
        name_x += small.getlength(name) + 40
    return canvas.finish()
