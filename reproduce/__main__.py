"""Both papers' tables and figures, measured again at toy size from the shipped weights, on one page.

    python -m reproduce                            everything, into reproduced/: index.html, results.json, timings.json
    python -m reproduce --only table1 figure23     some items of the list that --help ends with
    python -m reproduce --quick                    fewer samples, to see that it works; into reproduced/quick/
    python -m reproduce --results docs/results.md  what was found, as a page of the documentation; nothing is run
    python -m reproduce --train-ablation           the four Magic Fixups of the ablation, which are not shipped
    python -m reproduce --weights sd21.safetensors --images photos/ --networks weights/        at full size

A run that is stopped goes on where it was: an item that is finished is kept in reproduced/cache/ and not run again,
unless the code, its options or the weights have changed since, or --again says so. All that is the same every time is
in results.json, what a clock measured in timings.json; both and the page have every item that is finished.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("python -m reproduce")

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import TOY, TOY_MFX, Parser, folder_name, report_errors
from common.devices import choose_device, choose_precision
from common.files import atomic_write, write_json
from kernels.memory import hold_memory
from reproduce import (
    cache,
    dd_figures,
    dd_methods,
    dd_tables,
    few_steps,
    fidelity,
    mfx_figures,
    mfx_methods,
    mfx_tables,
    report,
    results,
    toy,
)
from reproduce.lab import MFX, OPEN, REGISTERED, Lab, NotHere, Outcome
from reproduce.lab import TOY as OF_TOY

INPAINTING = TOY.parent / "toy-inpainting"
MODULES = [  # as on the page
    m.__name__ for m in (
        dd_tables, dd_figures, dd_methods, few_steps, mfx_tables, mfx_figures, mfx_methods, toy, fidelity)]
ITEMS = {item.name: item for module in MODULES for item in REGISTERED if item.run.__module__ == module}
WEIGHTS = "weights", "mfx_weights", "ablation_weights", "inpainting_weights", "instruct_weights"


def run_item(item, lab, key):
    """-> a report.Entry, kept for the next time"""
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            outcome = item.run(lab)
    except NotHere as e:
        outcome = Outcome({}, (OPEN, str(e)))
    cache.write(item, key, outcome, round(time.perf_counter() - start, 1), lab.out)
    return cache.read(item, key, lab.out, lab.quick)


def list_items(found):
    """{name: Entry} found -> those of the page, in its order; and the names of items that are not among them"""
    names = [name for name, item in ITEMS.items() if item.chapter]
    return [found[name] for name in names if name in found], [name for name in names if name not in found]


def write(found, out, settings):
    """results.json, timings.json and the page, of all {name: Entry} found."""
    measured, timings = {}, {}
    entries, missing = list_items(found)
    for entry in entries:
        name, outcome = entry.item.name, entry.outcome
        verdict, why = outcome.verdict
        measured[name] = {"where": entry.item.where, "results": outcome.results}
        timings[name] = {"seconds": entry.seconds} | outcome.timings
        (timings if outcome.timings else measured)[name] |= {"verdict": verdict, "why": why}
    write_json(out / "results.json", {"measured with": settings, "items": measured})
    write_json(out / "timings.json", timings)
    with atomic_write(out / "index.html") as file:
        file.write_text(report.write_page(entries, settings, missing), encoding="utf-8")
    return entries


def run(args):
    if args.train_ablation:
        return mfx_tables.train_ablation(args.ablation_weights)
    # What the options leave open.
    base = args.out or Path("reproduced")
    args.out = base / "quick" if args.quick and not args.out else base
    is_toy = args.weights.resolve() == TOY.resolve()
    if args.inpainting_weights is None and is_toy and INPAINTING.is_dir():
        args.inpainting_weights = INPAINTING
    # A toy Magic Fixup beside a Stable Diffusion of another size would be no comparison.
    mixed = {name for name, item in ITEMS.items() if {"weights", "mfx_weights"} <= set(item.needs)}
    unfair = set() if is_toy or args.mfx_weights else mixed
    args.mfx_weights = args.mfx_weights or TOY_MFX
    if asked := unfair & set(args.only or ()):
        raise ValueError(f"{', '.join(asked)} compares --weights with a Magic Fixup: say which, --mfx-weights")
    for path in (args.images, args.inpainting_weights, args.instruct_weights, args.networks):
        if path and not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
    device = choose_device(args.device)
    lab = Lab(args, device, torch.float32 if is_toy else choose_precision("auto", device))

    # What is finished already.
    decisive = {name: cache.fingerprint(getattr(args, name)) for name in (*WEIGHTS, "images")}
    decisive |= {"as paper": args.as_paper, "prompt": args.prompt, "device": device.type}
    decisive["distance"] = lab.perceptual[0]
    settings = {
        "weights": args.weights.resolve().name, "perceptual distance": lab.perceptual[0], "device": device.type}

    def read(out, quick):
        """-> {name: Entry}, {name: key}"""
        keys = {name: cache.key_of(item, decisive | {"quick": quick}) for name, item in ITEMS.items()}
        kept = {name: cache.read(item, keys[name], out, quick) for name, item in ITEMS.items()}
        return {name: entry for name, entry in kept.items() if entry}, keys

    if args.results:
        found = {}
        for out, quick in ((base / "quick", True), (base, True), (base, False)):
            found |= read(out, quick)[0]
        names = [name for name, item in ITEMS.items() if item.chapter]
        return results.write_results(found, names, args.results, settings)

    (args.out / "cache").mkdir(parents=True, exist_ok=True)
    kept, keys = read(args.out, args.quick)
    found = {name: entry for name, entry in kept.items() if entry.current}
    settings["samples"] = "few (--quick)" if args.quick else "all"
    unfair |= set() if is_toy else {name for name, item in ITEMS.items() if item.chapter == OF_TOY}  # in its own words
    names = args.only or [name for name, item in ITEMS.items() if item.chapter and name not in unfair]
    bar = tqdm(list(dict.fromkeys(names)))
    for name in bar:
        bar.set_description(name)
        if name not in found or args.again:
            found[name] = run_item(ITEMS[name], lab, keys[name])
            write(found, args.out, settings)
        bar.write(json.dumps({name: found[name].outcome.results}))
    entries = write(found, args.out, settings)
    for entry in entries:
        if entry.item.name in names:
            verdict, why = entry.outcome.verdict
            print(f"{entry.item.chapter}, {entry.item.where}: {verdict}. {why}")
    print(f"{args.out / 'index.html'}: {len(entries)} items")


def main(argv=None):
    listed = "".join(f"\n  {n:16} {f'{MFX}, ' if i.chapter == MFX else ''}{i.where}" for n, i in ITEMS.items())
    parser = Parser(prog="python -m reproduce", description=__doc__, epilog="items:" + listed)
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), metavar="NAME", help="these items")
    parser.add_argument("--quick", action="store_true", help="fewer samples and steps")
    parser.add_argument("--as-paper", action="store_true", help="Table 1 and Figure 19 on 1,000 pictures in 100 steps, "
                        "for a GPU")
    parser.add_argument("--again", action="store_true", help="run finished items again")
    parser.add_argument("--weights", type=folder_name, default=TOY, help="the Stable Diffusion to edit with")
    parser.add_argument("--mfx-weights", type=folder_name, help="the Magic Fixup (default: weights/toy-mfx, which is "
                        "compared with no other --weights)")
    parser.add_argument("--ablation-weights", type=folder_name, default=Path("runs/ablation"), metavar="DIR",
                        help="folder with the four Magic Fixups of the ablation (default: runs/ablation)")
    parser.add_argument("--train-ablation", action="store_true", help="train them into that folder, and go on where "
                        "that was stopped; nothing else is done")
    parser.add_argument("--inpainting-weights", type=folder_name, help="an inpainting model, for Table 1's third "
                        "method; default: beside the toy weights/toy-inpainting, otherwise none")
    parser.add_argument("--instruct-weights", type=folder_name, help="an InstructPix2Pix, for Figure 9 and Magic "
                        "Fixup's Figure 2; default: none (reproduce.train_toys instruct trains the toy's)")
    parser.add_argument("--results", type=Path, metavar="PAGE", help="write what is finished, in --out and in its "
                        "folder quick/, into this Markdown page; nothing else is done")
    parser.add_argument("--networks", type=folder_name, metavar="DIR", help="folder with LPIPS's two files (default: "
                        "weights; without them there, a distance on the autoencoder's features)")
    parser.add_argument("--images", type=folder_name, metavar="DIR", help="pictures to edit instead of the toy world's")
    parser.add_argument("--prompt", default="snow at night", help="of the edits in Differential Diffusion's figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=folder_name, help="default: reproduced, or with --quick reproduced/quick")
    args = parser.parse_args(argv)
    memory = "a smaller --weights, or --device cpu. What is finished is kept"
    with report_errors(parser, memory, "what is finished is kept; the same command goes on"):
        run(args)


if __name__ == "__main__":
    hold_memory()
    main()
