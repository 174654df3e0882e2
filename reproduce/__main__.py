"""Both papers' tables and figures, measured again at toy size from the shipped weights, on one page.

    python -m reproduce                            everything, into reproduced/: index.html, results.json, timings.json
    python -m reproduce --only table1 figure23     some items of the list that --help ends with
    python -m reproduce --quick                    fewer samples, to see that it works; into reproduced/quick/
    python -m reproduce --weights sd21.safetensors --images photos/ --networks weights/        at full size

A run that is stopped goes on where it was: an item that is finished is kept in reproduced/cache/ and not run again,
unless its code, its options or the weights have changed since, or --again says so. All that is the same every time is
in results.json, what a clock measured in timings.json; both and the page have every item that is finished.

To add an item, write in dd_tables.py, dd_figures.py, mfx_tables.py or a module of your own that is imported below

    @item("figure9", "Figure 9",                       its name for --only; where the paper says it
          claim="...", done="...",                     the paper's claim in your own words; what is done here. {n} in
                                                       `done` becomes results["n"]. The claim's first sentence is in
                                                       the page's table of verdicts
          verdict=lambda r, t: judge((r["a"] > r["b"], "a is above b")),
                                                       from results and timings; judge joins parts of a claim into
                                                       came true / in part / did not. The text says what was found
          table=lambda r, t: [["", "paper", "here"], ["a", "0.97", f"{r['a']:.2f}"]],
                                                       rows of text for the page, the first one the head
          cost=60, chapter="Magic Fixup")              seconds on two cores in full; the page's chapter
    def figure9(lab):
        image = lab.images(lab.count(64, quick=4))     held-out scenes (or --images); lab has models, edits, distances
        for i in lab.each(range(10)): ...              moves the progress bar; lab.edit(..., each=lab.each) does too
        lab.save(charts.sheet(...), "figure9.png")     a picture, which Outcome lists with its caption
        return Outcome({"n": 64, "a": round(a, 3)}, [("figure9.png", "Left, right.")], timings={})

results must be the same in every run: random numbers from seeds, rounded; whatever a clock says goes into timings, and
then the verdict goes there too. Functions and modules of ours that the item calls are part of what decides whether a
kept result still holds: `source` finds them by name.
"""

import argparse
import hashlib
import inspect
import json
import time
import types
from pathlib import Path

import torch
from tqdm import tqdm

import diffdiff
import mfx
import sample
import sd
from common.cli import Parser, report_errors
from common.devices import choose_device, choose_precision
from common.files import atomic_write, read_json, write_json
from kernels.memory import hold_memory
from networks import lpips
from reproduce import dd_applications as applications_dd  # noqa: F401, its items
from reproduce import dd_costs as costs_dd  # noqa: F401, likewise
from reproduce import dd_figures as figures_dd  # noqa: F401, its items
from reproduce import dd_tables as claims_dd
from reproduce import lab as claims
from reproduce import mfx_ablation as ablation_mfx  # noqa: F401, its item
from reproduce import mfx_figures as figures_mfx  # noqa: F401, likewise
from reproduce import mfx_tables as claims_mfx
from reproduce import report as page
from reproduce import toy as claims_toy
from reproduce.mfx_tables import magic_fixup  # noqa: F401, for tests/test_weights.py, as are the next four
from reproduce.toy import adherence, autoencoder, gradient, latent_shape  # noqa: F401
from toy import world as toyworld

HERE = Path(__file__).parent.parent
CHAPTERS = (claims_dd.CHAPTER, claims_mfx.CHAPTER, claims_toy.CHAPTER)  # of the page, in this order
INPAINTING, ABLATION = HERE / "weights" / "toy-inpainting", HERE / "weights" / "ablation"
MFX = {"mfx_weights", "ablation_weights"}  # the options that name Magic Fixups

# ---------------------------------------------------------------------------------------------------------------------
# What is finished already


def source(f, seen=None):
    """Everything of ours that function f is made of: {name: text}, of the functions that it names, of theirs, of
    constants, and of the whole of every module that one of them names."""
    seen = {} if seen is None else seen
    codes = [f.__code__]
    text = inspect.getsource(f)
    seen[f"{f.__module__}.{f.__qualname__}"] = text[text.find("\ndef ") + 1 :]  # without an item's own texts above it
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for name in code.co_names:
            value = f.__globals__.get(name)
            for thing in value.values() if isinstance(value, dict) else [value]:
                thing = inspect.unwrap(thing) if callable(thing) else thing  # as functools.lru_cache wraps one
                if isinstance(thing, types.ModuleType):
                    add_module(thing, seen)
                elif isinstance(thing, type):
                    add_module(inspect.getmodule(thing), seen)
                elif isinstance(thing, types.FunctionType):
                    if ours(thing) and f"{thing.__module__}.{thing.__qualname__}" not in seen:
                        source(thing, seen)
            if isinstance(value, int | float | str | tuple | list | dict) and " at 0x" not in repr(value):
                seen[f"{f.__module__}.{name}"] = repr(value)  # and what has an address in it is code, or holds some
    return seen


def named(path):
    """A path for results.json, which is the same in every clone."""
    path = Path(path).resolve()
    return str(path.relative_to(HERE)) if path.is_relative_to(HERE) else path.name


def in_order(item):
    """As in CHAPTERS; in them tables, figures, sections, each by number."""
    kinds, words = ("Table", "Figure", "Section"), item.where.replace(",", "").split()
    number = next((float(w) for w in words if w[0].isdigit()), 0.0)
    kind = next((i for i, kind in enumerate(kinds) if words[0].startswith(kind)), len(kinds))
    return CHAPTERS.index(item.chapter), kind, number


def ours(thing):
    file = getattr(inspect.getmodule(thing), "__file__", None)
    return bool(file) and HERE.resolve() in Path(file).resolve().parents[:2]


def add_module(module, seen):
    """The module's text and that of those of ours that it imports."""
    if module is None or not ours(module) or module.__name__ in seen:
        return
    seen[module.__name__] = Path(module.__file__).read_text(encoding="utf-8")
    for value in vars(module).values():
        if isinstance(value, types.ModuleType):
            add_module(value, seen)


def fingerprint(path):
    """A file's or a folder's content; of what is larger than 256 MB, size and time."""
    if path is None or not Path(path).exists():
        return "none"
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            stat, name = file.stat(), file.name.encode()
            small = stat.st_size < 2**28
            digest.update(name + (file.read_bytes() if small else b"%d %d" % (stat.st_size, stat.st_mtime)))
    return digest.hexdigest()[:16]


def fixup_fingerprint(path):
    """Of a Magic Fixup, and of the autoencoder elsewhere that it may lean on."""
    index = Path(path or "", mfx.INDEX)
    elsewhere = read_json(index).get("vae") if path and index.is_file() else None
    return fingerprint(path) + (fingerprint(Path(path, str(elsewhere))) if elsewhere else "")


def digest_of(item, options):
    """Of all that decides an item's results: code, options, weights. Verdicts and texts are made anew every time."""
    code = source(item.run)
    source(claims.toy_distance, code)
    source(claims.quick, code)
    code["Lab"] = inspect.getsource(claims.Lab)
    for module in (sd, diffdiff, lpips, toyworld, *([mfx] if MFX & set(item.needs) else [])):  # what a Lab uses
        add_module(module, code)
    mine = {n: v for n, v in options.items() if n in item.needs or not n.endswith("weights")}
    parts = [item.name, mine, sorted(code.items())]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def kept(item, digest, out):
    """What was found when the item was run before -> (Outcome, seconds), or None."""
    try:
        found = json.loads((out / "cache" / f"{item.name}.json").read_text(encoding="utf-8"))
        if found["digest"] != digest or not all((out / name).is_file() for name, _ in found["pictures"]):
            return None
        return claims.Outcome(found["results"], found["pictures"], found["timings"]), found["seconds"]
    except (OSError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Run


def run_item(item, lab, digest):
    """-> (Outcome, seconds), kept for the next time"""
    start = time.perf_counter()
    with torch.inference_mode():
        outcome = item.run(lab)
    # As the file has it, so that a run that reads it gives the same page.
    outcome = claims.Outcome(*json.loads(json.dumps(outcome)))
    seconds = round(time.perf_counter() - start, 1)
    write_json(lab.out / "cache" / f"{item.name}.json", {"digest": digest, "seconds": seconds}
                       | outcome._asdict())
    return outcome, seconds


def write(found, options, out, told):
    """results.json, timings.json and the page, of all {name: (Outcome, seconds)} found."""
    entries, results, timings = [], {}, {}
    names = [i.name for i in sorted(claims.ITEMS.values(), key=in_order) if i.shown]
    for name in [n for n in names if n in found]:
        item, (outcome, seconds) = claims.ITEMS[name], found[name]
        verdict, why = item.verdict(outcome.results, outcome.timings)
        results[name] = {"where": item.where, "results": outcome.results}
        timings[name] = {"seconds": seconds} | outcome.timings
        (timings if outcome.timings else results)[name] |= {"verdict": verdict, "why": why}
        shown = outcome._replace(pictures=[(out / file, caption) for file, caption in outcome.pictures])
        entries.append(page.Entry(item, shown, verdict, why, seconds, f"python -m reproduce --only {name}{options}"))
    write_json(out / "results.json", {"measured with": told, "items": results})
    write_json(out / "timings.json", timings)
    missing = [n for n in names if n not in found]
    with atomic_write(out / "index.html") as file:
        file.write_text(page.page(entries, told, missing), encoding="utf-8")
    return entries


def run(args):
    out = args.out or Path("reproduced") / ("quick" if args.quick else "")
    (out / "cache").mkdir(parents=True, exist_ok=True)
    toy = args.weights.resolve() == sample.TOY.resolve()
    if args.inpainting_weights is None and toy and INPAINTING.is_dir():
        args.inpainting_weights = INPAINTING
    # A toy Magic Fixup beside a Stable Diffusion of another size would be no comparison.
    mixed = {name for name, item in claims.ITEMS.items() if {"weights", "mfx_weights"} <= set(item.needs)}
    unfair = set() if toy or args.mfx_weights else mixed
    args.mfx_weights = args.mfx_weights or sample.TOY_MFX
    if asked := unfair & set(args.only or ()):
        raise ValueError(f"{', '.join(asked)} compares --weights with a Magic Fixup: say which, --mfx-weights")
    args.out = out
    folders = args.images, args.inpainting_weights, args.ablation_weights, args.networks
    if absent := [folder for folder in folders if folder and not folder.exists()]:
        raise FileNotFoundError(f"{absent[0]}: there is no such file or folder")
    device = choose_device(args.device)
    dtype = torch.float32 if args.weights == sample.TOY else choose_precision("auto", device)
    lab = claims.Lab(args, device, dtype)

    weights = {n: fingerprint(getattr(args, n)) for n in ("weights", "inpainting_weights", "images")}
    weights["mfx_weights"] = fixup_fingerprint(args.mfx_weights)
    weights["ablation_weights"] = {
        name: fixup_fingerprint(claims_mfx.place_of(args.ablation_weights, name)) for name in claims_mfx.TRAINED}
    decisive = weights | {"quick": args.quick, "prompt": args.prompt, "device": device.type}
    decisive["distance"] = lab.perceptual[0]
    names = list(dict.fromkeys(args.only)) if args.only else [
        i.name for i in sorted(claims.ITEMS.values(), key=in_order) if i.shown and i.name not in unfair]
    digests = {name: digest_of(item, decisive) for name, item in claims.ITEMS.items()}
    found = {n: k for n, i in claims.ITEMS.items() if (k := kept(i, digests[n], out))}
    todo = [n for n in names if n not in found or args.again]
    told = {"weights": named(args.weights), "samples": "few (--quick)" if args.quick else "all",
            "perceptual distance": lab.perceptual[0], "device": device.type}
    options = " --quick" if args.quick else ""
    done, costs = 0.0, sum(claims.ITEMS[n].cost for n in todo) or 1
    with tqdm(total=costs, bar_format="{l_bar}{bar}| {elapsed} {postfix}", unit_scale=True) as bar:
        for name in names:
            item = claims.ITEMS[name]
            if name in todo:
                bar.set_postfix_str(name)
                lab.tick = lambda share, cost=item.cost, end=done + item.cost: bar.update(
                    max(0.0, min(share * cost, end - bar.n)))
                found[name] = run_item(item, lab, digests[name])
                done += item.cost
                bar.update(max(0.0, done - bar.n))
                write(found, options, out, told)
            bar.write(json.dumps({name: found[name][0].results}))
    entries = write(found, options, out, told)
    for entry in entries:
        if entry.item.name in names:
            print(f"{entry.item.chapter}, {entry.item.where}: {entry.verdict}. {entry.why}")
    print(f"{out / 'index.html'}: {len(entries)} items")


def main(argv=None):
    listed = "".join(f"\n  {n:16} {i.where}" for n, i in claims.ITEMS.items())
    parser = Parser(prog="python -m reproduce", description=__doc__.split("\n\nTo add")[0], epilog="items:" + listed,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(claims.ITEMS), metavar="NAME", help="these items")
    parser.add_argument("--quick", action="store_true", help="fewer samples and steps")
    parser.add_argument("--again", action="store_true", help="run finished items again")
    parser.add_argument("--weights", type=Path, default=sample.TOY, help="the Stable Diffusion to edit with")
    parser.add_argument("--mfx-weights", type=Path, help="the Magic Fixup (default: weights/toy-mfx, which is compared "
                        "with no other --weights)")
    parser.add_argument("--ablation-weights", type=Path, default=ABLATION, metavar="DIR", help="folder with the four "
                        "Magic Fixups of the ablation; python mfx_ablation.py trains them")
    parser.add_argument("--inpainting-weights", type=Path, help="an inpainting model, for Table 1's third method; "
                        "default: beside the toy weights/toy-inpainting, otherwise none")
    parser.add_argument("--networks", type=Path, metavar="DIR", help="folder with LPIPS's two files (default: weights; "
                        "without them there, a distance on the autoencoder's features)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures to edit instead of the toy world's")
    parser.add_argument("--prompt", default="snow at night", help="of the edits in Differential Diffusion's figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="default: reproduced, or with --quick reproduced/quick")
    args = parser.parse_args(argv)
    with report_errors(parser, "a smaller --weights, or --device cpu. What is finished is kept"):
        run(args)


if __name__ == "__main__":
    hold_memory()
    main()
