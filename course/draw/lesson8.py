"""Lesson 8's figure: error bars, and what pairing does to them."""

import mfx
from common.canvas import Canvas
from common.cli import TOY_MFX
from course.solutions.lesson8 import paired_difference, standard_error
from reproduce.mfx_tables import fix_up, make_user_edits

EDITS, STEPS = 12, 10


def draw(folder, dark):
    return [draw_bars(folder, dark)]


def measure():
    """Squared errors against the truth, in thousandths -> {what: (n,)}"""
    model, edits = mfx.load(TOY_MFX), make_user_edits(EDITS)
    other = edits | {"reference": edits["reference"].roll(1, 0)}  # everyone gets a neighbour's
    shown = {"coarse edit": edits["coarse"], "Magic Fixup": fix_up(model, edits, STEPS),
             "another's reference": fix_up(model, other, STEPS)}
    return {what: 1000 * (x - edits["truth"]).square().mean((1, 2, 3)) for what, x in shown.items()}


def draw_bars(folder, dark):
    """Left: each edit a dot, the mean and its standard error. Right: differences to Magic Fixup, with both errors."""
    found = measure()
    canvas = Canvas(760, 350, dark)
    most = max(x.max().item() for x in found.values())
    place = canvas.axes((56, 34, 400, 286), (0, 3), (0, 1.05 * most), "", "squared error x 1000, by edit", ticks=4)
    canvas.box(50, 289, 405, 306, canvas.paper)  # no numbers under names
    for i, (what, x) in enumerate(found.items()):
        colour = canvas.lines[i]
        for k, value in enumerate(x.tolist()):
            canvas.dot(*place(i + 0.25 + 0.2 * k / len(x), value), colour, 2.5)
        draw_bar(canvas, place, i + 0.7, x.mean().item(), standard_error(x), colour)
        canvas.text(place(i + 0.5, 0)[0], 294, f"{what}\n{x.mean():.2f} ± {standard_error(x):.2f}", 11, "ma", colour)

    # Differences: with errors as of different pictures, and pair by pair
    ours = found["Magic Fixup"]
    bars = []
    for what in ("coarse edit", "another's reference"):
        mean, error = paired_difference(found[what], ours)
        bars.append((what, mean, (standard_error(found[what]) ** 2 + standard_error(ours) ** 2) ** 0.5, error))
    low = min(0, *(mean - 2.2 * max(errors) for _, mean, *errors in bars))
    high = max(mean + 2.2 * max(errors) for _, mean, *errors in bars)
    place = canvas.axes((480, 34, 745, 286), (0, 2), (low, high), "", "less Magic Fixup's: bars of two errors", ticks=5)
    canvas.box(474, 289, 750, 306, canvas.paper)
    for i, (what, mean, loose, paired) in enumerate(bars):
        draw_bar(canvas, place, i + 0.3, mean, 2 * loose, canvas.faint)
        draw_bar(canvas, place, i + 0.7, mean, 2 * paired, canvas.ink)
        text = f"{what}\n{mean:.2f} ± {loose:.2f} unpaired\n± {paired:.2f} paired"
        canvas.text(place(i + 0.5, 0)[0], 294, text, 11, "ma")
    return canvas.save(folder, "lesson8-bars")


def draw_bar(canvas, place, x, mean, error, colour):
    """A mean, and a bar of one `error` up and down"""
    canvas.line([place(x, mean - error), place(x, mean + error)], colour, 3)
    for y in (mean - error, mean + error):
        canvas.line([place(x - 0.08, y), place(x + 0.08, y)], colour, 3)
    canvas.dot(*place(x, mean), colour, 5)
