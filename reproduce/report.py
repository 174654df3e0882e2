"""What -m reproduce found -> one HTML file that needs nothing else: no script, no font, no link to anywhere."""

import base64
import collections
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from reproduce.lab import FALSE, OPEN, PART, TRUE, Item, Outcome

MARK = {TRUE: ("yes", "✓"), PART: ("part", "◐"), FALSE: ("no", "✗"), OPEN: ("open", "–")}


@dataclass
class Entry:
    """An item that was run."""

    item: Item
    outcome: Outcome
    seconds: float  # that it took
    folder: Path  # that its pictures are in
    quick: bool = False  # few samples
    current: bool = True  # the code is still what it was

    @property
    def command(self):
        """What does it again"""
        return f"python -m reproduce --only {self.item.name}{' --quick' if self.quick else ''}"

    @property
    def claim(self):
        """Its first sentence"""
        return self.item.claim.split(". ")[0].rstrip(".") + "."

    @property
    def done(self):
        results = collections.defaultdict(lambda: "..", self.outcome.results)  # of an OPEN item there are none
        return self.item.done.format_map(results)

    @property
    def samples(self):
        """How many there are, and whether these are few; "" where an item has none"""
        n = self.outcome.results.get("n")
        return "" if n is None else f"{n}, few" if self.quick else str(n)


def write_page(entries, settings, missing=()):
    """[Entry], {what: value} that hold for all, names of items that were not run -> the page, as text"""
    body = [
        "<h1>Two papers, reproduced</h1>",
        "<p>What <em>Differential Diffusion</em> (arXiv 2306.00950) and <em>Magic Fixup</em> (arXiv 2403.13044) claim, "
        "measured again. Every number, chart and picture below was made by one program, "
        "<code>python -m reproduce</code>, and none by hand. What does not come true here says so, and why. "
        "Values after ± are standard errors.</p>",
        write_table([["", ""], *[[k, str(v)] for k, v in settings.items()]], head=False),
    ]
    if missing:
        body.append(f'<p class="soft">Not run: {escape(", ".join(missing))}.</p>')
    for chapter in dict.fromkeys(e.item.chapter for e in entries):
        mine = [e for e in entries if e.item.chapter == chapter]
        body.append(f'<h2>{escape(chapter)}</h2><div class="wide"><table><thead><tr><th>Where</th><th>Claim</th>'
                    "<th>Here</th></tr></thead><tbody>")
        for e in mine:
            body.append(f'<tr><td><a href="#{escape(e.item.name)}">{escape(e.item.where)}</a></td>'
                        f"<td>{escape(e.claim)}</td><td>{write_mark(e.outcome.verdict[0])}</td></tr>")
        body.append("</tbody></table></div>")
        body += [write_section(e) for e in mine]
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>Two papers, reproduced</title>'
            f"<style>{css}</style></head><body><main>{''.join(body)}</main></body></html>\n")


def write_section(entry):
    item, outcome = entry.item, entry.outcome
    verdict, why = outcome.verdict
    lines = [f'<section id="{escape(item.name)}"><h3>{escape(item.where)} {write_mark(verdict)}</h3><dl>']
    for name, text in (("Claim", item.claim), ("Done", entry.done), ("Found", why)):
        lines.append(f"<dt>{name}</dt><dd>{escape(text)}</dd>")
    took = f"{entry.seconds:.0f} s" if entry.seconds < 100 else f"{entry.seconds / 60:.0f} min"
    lines.append(f'<dt>Again</dt><dd><code>{escape(entry.command)}</code> <span class="soft">({took})</span></dd></dl>')
    lines.append(write_table(outcome.table) if outcome.table else "")
    for name, caption in outcome.pictures:
        source, width = inline_picture(entry.folder / name)
        lines.append(f'<figure><img src="{source}" alt="{escape(caption)}" width="{width}">'
                     f"<figcaption>{escape(caption)}</figcaption></figure>")
    return "".join([*lines, "</section>"])


def write_table(table, head=True):
    """Rows of text, the first one the head -> HTML"""
    first, *rest = table
    top = "<thead><tr>" + "".join(f"<th>{escape(c)}</th>" for c in first) + "</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rest)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def write_mark(verdict):
    name, sign = MARK[verdict]
    return f'<span class="mark {name}">{sign} {verdict}</span>'


def inline_picture(path):
    """A picture -> data: URI, as JPEG where that is half as long or shorter; and the width that it is shown at. Charts
    are drawn at twice that width, and their names say so."""
    png, jpeg = path.read_bytes(), io.BytesIO()
    with Image.open(path) as picture:
        width = picture.width // 2 if "chart" in path.stem else picture.width
        picture.convert("RGB").save(jpeg, "JPEG", quality=90, subsampling=0)
    jpeg = jpeg.getvalue()
    kind, content = ("jpeg", jpeg) if len(jpeg) < len(png) / 2 else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width
