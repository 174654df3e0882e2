"""What -m reproduce found -> one HTML file that needs nothing else: no script, no font, no link to anywhere."""

import base64
import collections
import html
import io
from dataclasses import dataclass

from PIL import Image

from reproduce.lab import FALSE, OPEN, PART, TRUE, Item, Outcome

MARK = {TRUE: ("yes", "✓"), PART: ("part", "◐"), FALSE: ("no", "✗"), OPEN: ("open", "–")}


@dataclass
class Entry:
    """An item that was run."""

    item: Item
    outcome: Outcome
    seconds: float  # that it took
    command: str  # that does it again


CSS = """
:root { color-scheme: light dark; --ink: #1d1d1b; --paper: #fdfdfb; --soft: #666; --line: #dcdcd6; --band: #f3f3ee;
  --yes: #1f7a3d; --part: #96690a; --no: #b02a22; --open: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4df; --paper: #181818; --soft: #a3a19b; --line: #3a3a38;
  --band: #232322; --yes: #6cc788; --part: #e0b352; --no: #f08a80; --open: #a3a19b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 Charter, "Bitstream Charter", Cambria,
  Georgia, serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.2rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.45rem; margin: 3.5rem 0 .5rem; border-bottom: 2px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1.15rem; margin: 0 0 .5rem; display: flex; gap: .8rem; align-items: baseline; flex-wrap: wrap; }
section { margin: 2.4rem 0; padding-top: .4rem; }
p { margin: .5rem 0; }
.soft, figcaption, dt { color: var(--soft); }
dl { display: grid; grid-template-columns: 6.5rem 1fr; gap: .35rem .8rem; margin: .6rem 0; }
dt { font-size: .9rem; padding-top: .1rem; } dd { margin: 0; }
table { border-collapse: collapse; margin: .9rem 0; font-size: .93rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid var(--line); }
.mark { font: 600 .8rem/1.4 system-ui, sans-serif; padding: .1rem .5rem; border-radius: .3rem; white-space: nowrap;
  border: 1px solid currentColor; }
.yes { color: var(--yes); } .part { color: var(--part); } .no { color: var(--no); } .open { color: var(--open); }
figure { margin: 1.1rem 0; } figcaption { font-size: .9rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; display: block; background: #fff; padding: 4px; border-radius: 3px; }
code { font: .85em/1.4 ui-monospace, Menlo, Consolas, monospace; background: var(--band); padding: .1em .35em;
  border-radius: 3px; overflow-wrap: anywhere; }
a { color: inherit; text-decoration-color: var(--soft); }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .5rem } }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --band: #f4f4f4;
    --yes: #14592b; --part: #6d4c05; --no: #8d1d17; --open: #444; }
  body { font-size: 10pt } main { max-width: none; padding: 0 } figure, tr, h3, dl { break-inside: avoid }
  h2, h3 { break-after: avoid } .wide { overflow: visible } @page { margin: 18mm 16mm }
}
"""


def write_page(entries, folder, settings, missing=()):
    """[Entry], the folder that their pictures are in, {what: value} that hold for all, names of items that were not run
    -> the page, as text"""
    body = [
        "<h1>Two papers, reproduced</h1>",
        "<p>What <em>Differential Diffusion</em> (arXiv 2306.00950) and <em>Magic Fixup</em> (arXiv 2403.13044) claim, "
        "measured again. Every number, chart and picture below was made by one program, "
        "<code>python -m reproduce</code>, and none by hand; what does not come true here is said to, and why. "
        "Values after ± are standard errors.</p>",
        rows([["", ""], *[[k, str(v)] for k, v in settings.items()]], head=False),
    ]
    if missing:
        body.append(f'<p class="soft">Not run: {escape(", ".join(missing))}.</p>')
    for chapter in dict.fromkeys(e.item.chapter for e in entries):
        mine = [e for e in entries if e.item.chapter == chapter]
        body.append(f'<h2>{escape(chapter)}</h2><div class="wide"><table><thead><tr><th>Where</th><th>Claim</th>'
                    "<th>Here</th></tr></thead><tbody>")
        for e in mine:
            first_sentence = e.item.claim.split(". ")[0].rstrip(".") + "."
            body.append(f'<tr><td><a href="#{escape(e.item.name)}">{escape(e.item.where)}</a></td>'
                        f"<td>{escape(first_sentence)}</td><td>{mark(e.outcome.verdict[0])}</td></tr>")
        body.append("</tbody></table></div>")
        body += [section(e, folder) for e in mine]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>Two papers, reproduced</title>'
            f"<style>{CSS}</style></head><body><main>{''.join(body)}</main></body></html>\n")


def section(entry, folder):
    item, outcome = entry.item, entry.outcome
    verdict, why = outcome.verdict
    done = item.done.format_map(collections.defaultdict(lambda: "..", outcome.results))  # results of an OPEN item: none
    lines = [f'<section id="{escape(item.name)}"><h3>{escape(item.where)} {mark(verdict)}</h3><dl>']
    for name, text in (("Claim", item.claim), ("Done", done), ("Found", why)):
        lines.append(f"<dt>{name}</dt><dd>{escape(text)}</dd>")
    took = f"{entry.seconds:.0f} s" if entry.seconds < 100 else f"{entry.seconds / 60:.0f} min"
    lines.append(f'<dt>Again</dt><dd><code>{escape(entry.command)}</code> <span class="soft">({took})</span></dd></dl>')
    lines.append(rows(outcome.table) if outcome.table else "")
    for name, caption in outcome.pictures:
        source, width = inlined(folder / name)
        lines.append(f'<figure><img src="{source}" alt="{escape(caption)}" width="{width}">'
                     f"<figcaption>{escape(caption)}</figcaption></figure>")
    return "".join([*lines, "</section>"])


def rows(table, head=True):
    """Rows of text, the first one the head -> HTML"""
    first, *rest = table
    top = "<thead><tr>" + "".join(f"<th>{escape(c)}</th>" for c in first) + "</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rest)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def mark(verdict):
    name, sign = MARK[verdict]
    return f'<span class="mark {name}">{sign} {verdict}</span>'


def escape(text):
    return html.escape(str(text), quote=True)


def inlined(path):
    """A picture -> data: URI, as JPEG where that is half as long or shorter; and the width that it is shown at. Charts
    are drawn at twice that width, and their names say so."""
    png, jpeg = path.read_bytes(), io.BytesIO()
    with Image.open(path) as picture:
        width = picture.width // 2 if "chart" in path.stem else picture.width
        picture.convert("RGB").save(jpeg, "JPEG", quality=90, subsampling=0)
    jpeg = jpeg.getvalue()
    kind, content = ("jpeg", jpeg) if len(jpeg) < len(png) / 2 else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width
