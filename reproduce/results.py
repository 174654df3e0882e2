"""docs/results.md, written from what -m reproduce found: what is there and what is not, and every number."""

import os
import shutil
import textwrap
from pathlib import Path

from reproduce.papers import ABSENT, DONE, ROWS, STAND_IN, count_states

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = "table1", "figure14", "magic_fixup"  # items whose first picture is shown, from a copy in examples/

PREFACE = """\
# What comes true

`python -m reproduce` measures the papers' claims again, at toy size, and writes one page with all pictures,
`reproduced/index.html`. `--quick` takes few samples, to see that it works. With `--weights`, `--inpainting-weights`,
`--mfx-weights`, `--images` and `--networks` it does the same at full size. A run that is stopped goes on where it was.

`python -m reproduce --results docs/results.md` writes this page from what was found. What did not come true is
reported like the rest. Everything is in the table of what is there and what is not; the numbers follow.

## Every table and figure

"""
RULE = """
**Done**: an item makes what the paper's table or figure shows, by the paper's construction. The world, the models and
the number of samples are the toy's, and the perceptual distance is LPIPS's construction on toy features (`--only
distance` says why it can be trusted). **Stand-in**: an item tests the same claim, but replaces a method, the people or
the kind of picture; or it shows only a part. **Absent**: nothing makes it. "Done" does not say that the claim came
true. A table counts by its worst row, diagrams as absent. Algorithms are not counted, nor the pages of examples without
a number in Differential Diffusion's section 12.1. In every stand-in for a study nobody was asked: measures vote.

Four models of the ablation are not shipped: `python -m reproduce --train-ablation` makes them. Items that need them
say so below where they were not there.
"""


def write_results(entries, missing, page, settings):
    """Write the Markdown page. entries [report.Entry], and the names of items that were not run."""
    text = PREFACE + write_status() + write_numbers(entries, page, settings, missing)
    Path(page).write_text(text, encoding="utf-8")


def write_status():
    """-> what is done, what has a stand-in, what is absent, as Markdown"""
    counts = [["", DONE, STAND_IN, ABSENT, "all"]]
    counts += [[name, *map(str, count_states(paper))] for name, paper in (*((p, p) for p in ROWS), ("both", None))]
    parts = [write_table(counts), RULE]
    for paper, rows in ROWS.items():
        table = [["", "what it shows", "", "`--only`", "how, or why not"]]
        table += [[row.where, row.shows, row.state, f"`{row.item}`" if row.item else "", row.why] for row in rows]
        parts.append(f"\n### {paper}\n\n{write_table(table)}")
    return "".join(parts)


def write_numbers(entries, page, settings, missing):
    what = ", ".join(f"{name}: {value}" for name, value in settings.items())
    parts = [f"\n## Numbers\n\n± are standard errors. {what[0].upper()}{what[1:]}. Few: with `--quick`.\n"]
    if old := [e for e in entries if not e.current]:
        parts.append(f"\n{len(old)} of {len(entries)} items were measured before the code changed last.\n")
    if missing:
        parts.append(f"\nNot run here: {', '.join(f'`{name}`' for name in missing)}.\n")
    for chapter in dict.fromkeys(e.item.chapter for e in entries):
        mine = [e for e in entries if e.item.chapter == chapter]
        table = [["", "claim", "here", "samples", "`--only`"]]
        table += [[e.item.where, e.claim, e.outcome.verdict[0], e.samples, f"`{e.item.name}`"] for e in mine]
        parts.append(f"\n## {chapter}: verdicts\n\n{write_table(table)}")
        parts += [write_section(e, page) for e in mine]
    return "".join(parts)


def write_section(entry, page):
    """An item: its claim, what was done and found, its table, and the command that does it again"""
    item, outcome = entry.item, entry.outcome
    verdict, why = outcome.verdict
    found = f"**{verdict[0].upper()}{verdict[1:]}{f', n = {entry.samples}' if entry.samples else ''}:** {why}"
    lines = [f"\n### {item.where}\n", *(f"\n{textwrap.fill(text, 120)}\n" for text in (item.claim, entry.done, found))]
    if outcome.table:
        lines.append("\n" + write_table(outcome.table))
    if item.name in PICTURES and outcome.pictures:
        name, caption = outcome.pictures[0]
        shutil.copyfile(entry.folder / name, EXAMPLES / name)
        source = Path(os.path.relpath(EXAMPLES / name, Path(page).parent)).as_posix()
        lines.append(f'\n<img src="{source}" width="780" alt="{caption}">\n')
    return "".join([*lines, f"\n`{entry.command}`\n"])


def write_table(rows):
    """Rows of text, the first one the head -> a Markdown table"""
    width = max(map(len, rows))
    rows = [[str(cell).replace("|", r"\|") for cell in row] + [""] * (width - len(row)) for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * width, *body, ""])
