"""docs/results.md, written from what -m reproduce found: what is there and what is not, and every number."""

import os
import shutil
import textwrap
from pathlib import Path

from common.files import atomic_write
from reproduce.lab import OPEN
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
distance` says how far it can be trusted). **Stand-in**: an item tests the same claim, but replaces a method, the people
or the kind of picture; or it shows only a part. **Absent**: nothing makes it. "Done" does not say that the claim came
true. A table counts by its worst row, diagrams as absent. Algorithms are not counted, nor the pages of examples without
a number in Differential Diffusion's section 12.1. In every stand-in for a study nobody was asked: measures vote.

Four models of the ablation are not shipped: `python -m reproduce --train-ablation` makes them. Items that need them
say so below where they were not there.
"""


def write_results(found, names, page, settings):
    """Write the Markdown page. found {name: report.Entry}; names of all items that belong there, in its order. What an
    item that was not run here has on the page that is there stays."""
    page = Path(page)
    if page.exists() and not page.read_text(encoding="utf-8", errors="replace").startswith(PREFACE[:10]):
        raise ValueError(f"{page} is there, and no page of results: choose another name")
    text = PREFACE + write_status() + write_numbers(found, names, page, settings)
    with atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def write_numbers(found, names, page, settings):
    what = ", ".join(f"{name}: {value}" for name, value in settings.items())
    parts = [f"\n## Numbers\n\n± are standard errors. {what[0].upper()}{what[1:]}. Few: with `--quick`.\n"]
    before = read_numbers(page)
    shown = before | {name: (e.item.chapter, write_verdict(e), write_section(e, page)) for name, e in found.items()
                      if name not in before or e.outcome.verdict[0] != OPEN}
    if kept := [name for name in names if name in shown and shown[name] is before.get(name)]:
        said = f"Not run again, as they stood here before: {', '.join(f'`{name}`' for name in kept)}."
        parts.append(f"\n{textwrap.fill(said, 120)}\n")
    if missing := [name for name in names if name not in shown]:
        parts.append(f"\nNot run here: {', '.join(f'`{name}`' for name in missing)}.\n")
    shown = {name: shown[name] for name in names if name in shown}
    for chapter in dict.fromkeys(of for of, _, _ in shown.values()):
        rows, sections = zip(*(rest for of, *rest in shown.values() if of == chapter))
        table = write_table([["", "claim", "here", "samples", "`--only`"], *rows])
        parts += [f"\n## {chapter}: verdicts\n\n{table}", *sections]
    return "".join(parts)


def read_numbers(page):
    """A page that was written before, if there is one -> {name: (chapter, row of its verdict, section)}"""
    text = Path(page).read_text(encoding="utf-8") if Path(page).exists() else ""
    shown = {}
    for part in text.partition("\n## Numbers\n")[2].split("\n## ")[1:]:
        head, *sections = part.split("\n### ")
        rows = [line[2:-2].replace(r"\|", "|").split(" | ") for line in head.splitlines() if line.endswith("` |")]
        rows = {row[-1].strip("`"): row for row in rows}
        for section in sections:
            name = section.rpartition("`python -m reproduce --only ")[2].strip("`\n").removesuffix(" --quick")
            if name in rows:
                shown[name] = head.partition(": verdicts")[0], rows[name], "\n### " + section
    return shown


def write_verdict(entry):
    return [entry.item.where, entry.claim, entry.outcome.verdict[0], entry.samples, f"`{entry.item.name}`"]


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
    first = "`python -m reproduce --train-ablation`, once; then " if "ablation_weights" in item.needs else ""
    return "".join([*lines, f"\n{first}`{entry.command}`\n"])


def write_table(rows):
    """Rows of text, the first one the head -> a Markdown table"""
    width = max(map(len, rows))
    rows = [[str(cell).replace("|", r"\|") for cell in row] + [""] * (width - len(row)) for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * width, *body, ""])
