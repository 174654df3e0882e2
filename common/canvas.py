"""What charts and figures are drawn with: text, lines, pictures and axes, in light or dark, with Pillow alone.

    canvas = Canvas(640, 300, dark=False)
    canvas.text(320, 20, "nested masks", size=18, anchor="mm")
    canvas.picture(x, 10, 40, 128)                       a tensor or a picture, 128 wide
    place = canvas.axes((400, 40, 620, 260), (0, 1), (0, 50), "strength", "steps")
    canvas.line([place(s, n) for s, n in points], canvas.lines[0])
    canvas.save(folder, "lesson4-masks")                 lesson4-masks.png or lesson4-masks-dark.png

All places and sizes are in pixels of a slide. The file has twice as many a side, or `scale` times: 1 is for pictures of
noise, which PNG cannot make small. Letters are those of Pillow's own font, which has no Greek: write mu, eps.
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.pictures import save_picture, tensor_to_picture

FINE = 2  # everything is drawn so many times larger still, for smooth lines
# paper, ink, faint ink, and the colours of lines, in turn
LIGHT = "#ffffff", "#222222", "#c8c8c8", ("#0b62a4", "#c8501e", "#2a8a4a", "#8a4fb0", "#b08a10")
DARK = "#16181d", "#e8e8e8", "#4a4e57", ("#6ab7f5", "#ff9a6a", "#6fd08f", "#cfa1f0", "#e6c65a")


class Canvas:
    """A figure of width x height. Its colours: .paper .ink .faint, and .lines, five of them."""

    def __init__(self, width, height, dark=False, scale=2):
        self.dark = dark
        self.paper, self.ink, self.faint, self.lines = DARK if dark else LIGHT
        self.zoom = scale * FINE
        self.image = Image.new("RGB", (width * self.zoom, height * self.zoom), self.paper)
        self.draw = ImageDraw.Draw(self.image)

    def points(self, points):
        return [(x * self.zoom, y * self.zoom) for x, y in points]

    def text(self, x, y, text, size=13, anchor="la", colour=None):
        """Text of one or more lines; anchor as Pillow's: l, m, r across, then a, m, d from the top down."""
        font = ImageFont.load_default(size * self.zoom)
        lines = text.split("\n")
        step = 1.25 * size
        first = {"a": 0, "m": -step * (len(lines) - 1) / 2, "d": -step * (len(lines) - 1)}.get(anchor[1], 0)
        for i, line in enumerate(lines):
            place = self.points([(x, y + first + i * step)])[0]
            self.draw.text(place, line, colour or self.ink, font, anchor=anchor)

    def line(self, points, colour=None, width=2):
        """points [(x, y)], two or more"""
        self.draw.line(self.points(points), colour or self.ink, round(width * self.zoom), joint="curve")

    def arrow(self, start, end, colour=None, width=2):
        """A line from (x, y) to (x, y), with a head at its end"""
        colour = colour or self.ink
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        head = 4 * width
        neck = end[0] - head * math.cos(angle), end[1] - head * math.sin(angle)
        self.line([start, neck], colour, width)
        across = 0.45 * head * math.sin(angle), -0.45 * head * math.cos(angle)
        corners = [end, (neck[0] + across[0], neck[1] + across[1]), (neck[0] - across[0], neck[1] - across[1])]
        self.draw.polygon(self.points(corners), colour)

    def box(self, left, top, right, bottom, fill=None, outline=None, width=1, radius=0):
        corners = self.points([(left, top), (right, bottom)])
        self.draw.rounded_rectangle(corners, radius * self.zoom, fill, outline, round(width * self.zoom))

    def dot(self, x, y, colour=None, radius=3):
        (x, y), = self.points([(x, y)])
        r = radius * self.zoom
        self.draw.ellipse([x - r, y - r, x + r, y + r], colour or self.ink)

    def picture(self, x, left, top, width, smooth=True):
        """x  a picture, (3, H, W) in [-1, 1], or a map (H, W) in [0, 1]; smooth=False shows its pixels as squares

        -> the y below it
        """
        picture = to_picture(x)
        height = round(width * picture.height / picture.width)
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        self.image.paste(picture.resize((width * self.zoom, height * self.zoom), how), self.points([(left, top)])[0])
        return top + height

    def axes(self, box, x_range, y_range, x_label="", y_label="", ticks=5):
        """Axes in box (left, top, right, bottom), about `ticks` round numbers outside, and a thicker line at 0

        -> place(x, y): where a point of them is drawn
        """
        left, top, right, bottom = box

        def place(x, y):
            across = (x - x_range[0]) / (x_range[1] - x_range[0])
            up = (y - y_range[0]) / (y_range[1] - y_range[0])
            return left + across * (right - left), bottom - up * (bottom - top)

        for x in round_ticks(*x_range, ticks):
            self.line([place(x, y_range[0]), place(x, y_range[1])], self.faint, 1 if x else 2)
            self.text(place(x, 0)[0], bottom + 4, f"{x:.4g}", 11, "ma")
        for y in round_ticks(*y_range, ticks):
            self.line([place(x_range[0], y), place(x_range[1], y)], self.faint, 1 if y else 2)
            self.text(left - 5, place(0, y)[1], f"{y:.4g}", 11, "rm")
        self.text((left + right) / 2, bottom + 20, x_label, 12, "ma")
        self.text(left, top - 6, y_label, 12, "ld")
        return place

    def finish(self):
        """-> picture of 64 greys in each channel, not 256: no eye sees it, and the file is half as large"""
        return self.image.reduce(FINE).point(lambda v: min(255, (v + 2) // 4 * 4))

    def save(self, folder, name):
        """-> the path: folder/NAME.png, or folder/NAME-dark.png"""
        path = Path(folder) / f"{name}{'-dark' * self.dark}.png"
        save_picture(self.finish(), path, {})
        return path


def round_ticks(start, end, count):
    """-> about `count` multiples of 1, 2 or 5 times a power of ten, from the lesser of start and end to the other"""
    rough = abs(end - start) / (count - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda n: abs(math.log(n * power / rough)))
    low, high = min(start, end) / step, max(start, end) / step
    return [step * i for i in range(math.ceil(low - 1e-6), math.floor(high + 1e-6) + 1)]


def to_picture(x):
    """(3, H, W) in [-1, 1], or a map (H, W) in [0, 1] -> picture. A picture is one; None, an empty place, stays"""
    if not torch.is_tensor(x):
        return x and x.convert("RGB")
    return tensor_to_picture(x / 2 + 0.5 if x.ndim == 3 else x[None])


def heat(x, most=None):
    """(H, W) of either sign -> picture: blue below 0, grey at 0, orange above; full colour at `most`"""
    x = x.float()
    x = (x / (most or x.abs().max().clamp(min=1e-12))).clamp(-1, 1)
    zero = torch.tensor([0.86, 0.86, 0.86])
    ends = torch.tensor([[0.04, 0.30, 0.62], [0.80, 0.32, 0.08]])
    colour = zero + x.abs()[..., None] * (ends[(x > 0).long()] - zero)  # (H, W, 3)
    return tensor_to_picture(colour.permute(2, 0, 1))
