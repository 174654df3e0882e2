"""Sheets of pictures and charts of numbers, drawn with Pillow, for the page that -m reproduce writes."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, LINES = "#222222", "#d5d5d5", ("#0b62a4", "#c8501e", "#2a8a4a", "#7a4ea3", "#a08000", "#555555")
SCALE = 2  # charts are drawn at twice the size that they are shown at


def broken(text, font, width):
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

    rows     lists of pictures, each drawn `cell` pixels wide; None leaves a blank
    columns  texts over the columns, and labels: texts at the left of the rows; broken at spaces. None: none
    """
    font = ImageFont.load_default(12)
    n = max(map(len, rows))
    heads = [broken(text, font, cell) for text in columns or []]
    sides = [broken(text, font, 96) for text in labels or []]
    top = 15 * max(map(len, heads), default=0) + (4 if heads else 0)
    left = (max(round(font.getlength(line)) for lines in sides for line in lines) + 8) if sides else 0
    heights = [max(round(p.height * cell / p.width) for p in row if p) for row in rows]
    size = left + n * (cell + gap) - gap, top + sum(heights) + gap * (len(rows) - 1)
    out = Image.new("RGB", size, "white")
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


def heat(x, low=None, high=None):
    """(H, W) -> picture: grey, `low` black, `high` white; None: the least, the largest"""
    x = np.asarray(x, np.float64)
    low, high = x.min() if low is None else low, x.max() if high is None else high
    grey = np.clip((x - low) / max(high - low, 1e-12), 0, 1)
    return Image.fromarray((grey * 255).round().astype(np.uint8)).convert("RGB")


def ticks(low, high, about=5):
    """Round numbers from low to high."""
    step = 10 ** np.floor(np.log10((high - low) / about))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - about))
    first = np.ceil(low / step - 1e-9)
    return [float(first + i) * step for i in range(int(np.floor(high / step + 1e-9) - first) + 1)]


def chart(series, x_label, y_label, size=(560, 340), y_range=None):
    """Lines and dots -> picture, twice `size`.

    series  [(name, x, y, options)], options: "dots" True for dots, "line" True for a line through them
    """
    font, small = ImageFont.load_default(13 * SCALE), ImageFont.load_default(12 * SCALE)
    width, height = (s * SCALE for s in size)
    left, right, top, bottom = 62 * SCALE, 14 * SCALE, 12 * SCALE, 46 * SCALE
    xs = np.concatenate([np.asarray(s[1], float) for s in series])
    ys = np.concatenate([np.asarray(s[2], float) for s in series])
    pad = 0.06 * (ys.max() - ys.min() or 1)
    x0, x1 = xs.min(), xs.max()
    y0, y1 = y_range or (ys.min() - pad, ys.max() + pad)

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (width - left - right),
                height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom))

    out = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(out)
    for t in ticks(x0, x1, 8):
        x, y = place(t, y0)
        draw.line([(x, y), (x, top)], FAINT, SCALE)
        draw.text((x, y + 5 * SCALE), f"{t:.10g}", INK, small, anchor="mt")
    for t in ticks(y0, y1):
        x, y = place(x0, t)
        draw.line([(x, y), (width - right, y)], FAINT, SCALE)
        draw.text((x - 6 * SCALE, y), f"{t:.10g}", INK, small, anchor="rm")
    draw.text(((left + width - right) / 2, height - 4 * SCALE), x_label, INK, font, anchor="md")
    side = Image.new("RGB", (round(font.getlength(y_label)) + 8, 20 * SCALE), "white")
    ImageDraw.Draw(side).text((side.width / 2, side.height / 2), y_label, INK, font, anchor="mm")
    side = side.rotate(90, expand=True)
    out.paste(side, (0, int((top + height - bottom - side.height) / 2)))
    for i, (_, x, y, options) in enumerate(series):
        colour = LINES[i % len(LINES)]
        points = [place(*p) for p in zip(x, y)]
        if options.get("line", not options.get("dots")):
            draw.line(points, colour, 2 * SCALE, joint="curve")
        if options.get("dots"):
            r = 3.5 * SCALE
            for px, py in points:
                draw.ellipse([px - r, py - r, px + r, py + r], colour)
    legend(draw, series, small, width - right, place, x0, y0, x1, y1, top)
    return out


def legend(draw, series, font, edge, place, x0, y0, x1, y1, top):
    """The names, in that upper corner in which there is less."""
    mid_x, mid_y = (x0 + x1) / 2, (y0 + y1) / 2
    crowd = [sum(np.sum((np.asarray(x) > mid_x) == right) and
                 np.sum(((np.asarray(x) > mid_x) == right) & (np.asarray(y) > mid_y)) for _, x, y, _ in series)
             for right in (False, True)]
    names = [(i, name) for i, (name, *_) in enumerate(series) if name]
    wide = max((font.getlength(name) for _, name in names), default=0) + 26 * SCALE
    x = edge - wide - 4 * SCALE if crowd[1] <= crowd[0] else place(x0, y0)[0] + 8 * SCALE
    if names:
        draw.rectangle([x - 4 * SCALE, top, x + wide, top + 18 * SCALE * len(names) + 4 * SCALE], "white")
    for row, (i, name) in enumerate(names):
        y = top + (12 + 18 * row) * SCALE
        colour = LINES[i % len(LINES)]
        draw.line([(x, y), (x + 18 * SCALE, y)], colour, 3 * SCALE)
        draw.text((x + 24 * SCALE, y), name, INK, font, anchor="lm")
