"""Speed and memory, side by side with what one would use instead. A topic is a table, a row is a pair.

    python -m bench unet vae                 some topics, or `all`; --help lists them
    python -m bench unet --dtype bf16 --batch 1,2 --rounds 3
    python -m bench edit mfx --model toy     the shipped weights alone, without what takes minutes
    python -m bench train splat --device cuda
    python -m bench --page                   BENCHMARKS.md, from all that was measured so far

Each pair has the same weights and the same inputs, and its two functions are called in turn: medians, the least and the
largest, and the ratio ours / peer, below 1 where ours is faster. Without --rounds there are five of what is quick and
fewer of what is slow, so that a topic takes minutes on two cores; an idle machine measures best. Where a peer is not
installed, our time stands alone. All weights that are not shipped are random: nothing is downloaded.

Every row is printed as Markdown at the end of its topic, and kept in a log at once, with the machine and all versions.

To add a topic, write a function in a bench_*.py and name it in that file's TOPICS. It is given the options below, and
returns {row: function}; each of these returns {column: figure}, as `compare` of bench/clock.py does. Its docstring says
on the page what is measured.
"""

import argparse
import inspect
import shlex
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from bench import edits as bench_edits
from bench import models as bench_models
from bench import networks as bench_networks
from bench import page as bench_page
from bench import profile as bench_profile
from bench import scale as bench_scale
from bench import training as bench_training
from bench import warp as bench_warp
from bench.clock import HELD
from common.cli import Parser, number
from common.devices import choose_device

TOPICS = {  # name: (title, function)
    name: topic
    for module in (bench_models, bench_edits, bench_profile, bench_training, bench_warp, bench_networks, bench_scale)
    for name, topic in module.TOPICS.items()
}
CPU_ALONE = ("load", "toyworld", "pairs", "networks")  # their device is the CPU, whatever there is


def several(kind, low, high):
    one = number(kind, low, high)
    return lambda text: [one(part) for part in text.split(",")]


def parse(argv):
    about = "\n".join(f"  {name:9} {title}" for name, (title, _) in TOPICS.items())
    p = Parser(prog="python -m bench", description=f"{__doc__}\nTopics:\n{about}",
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("topics", nargs="*", metavar="TOPIC")
    p.add_argument("--rounds", type=number(int, 1, 1000), help="timed calls of each (default: 5, fewer if slow)")
    p.add_argument("--model", choices=["toy", "full"], help="of the toy's sizes or Stable Diffusion 1.4's")
    p.add_argument("--size", type=number(int, 8, 8192), help="pixels along a side of the pictures")
    p.add_argument("--steps", type=number(int, 1, 1000), help="of whole edits (default: 50 of the toy, 4 at full size)")
    p.add_argument("--batch", type=several(int, 1, 4096), metavar="N,N", help="unet, vae, text, train: batch sizes")
    p.add_argument("--dtype", choices=["fp32", "bf16", "auto"], help="one alone; auto: what sample.py takes here")
    p.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--tmp", type=Path, help="folder for the checkpoints, 6 GB, and for the log")
    p.add_argument("--log", type=Path, help="default: bench.jsonl, in --tmp or here")
    p.add_argument("--page", nargs="?", type=Path, const=Path("BENCHMARKS.md"), help="write the page, from the log")
    args = p.parse_args(argv)
    args.log = args.log or (args.tmp or Path()) / "bench.jsonl"
    return p, args


def chosen(names):
    """-> topics, each once. ValueError for one that there is not."""
    for name in names:
        if name not in TOPICS and name != "all":
            raise ValueError(f"there is no topic {name!r}: choose {', '.join(TOPICS)}, or all")
    return list(TOPICS) if "all" in names else list(dict.fromkeys(names))


def measure(topic, options, about):
    """Run a topic's rows -> its records, each of which is in the log as soon as it is there."""
    records, rows = [], TOPICS[topic][1](options)
    with tqdm(rows.items(), topic, unit="row") as bar:
        for row, run in bar:
            bar.set_postfix_str(row)
            try:
                figures = run()
            except Exception as e:  # the others are still worth having
                if not isinstance(e, ImportError):
                    traceback.print_exc()
                figures = {"failed": f"{type(e).__name__}: {e}".splitlines()[0]}
            records.append({"topic": topic, "device": options.device.type, "row": row, "figures": figures} | about)
            bench_page.append(options.log, records[-1])
    HELD.clear()
    return records


def run(args, argv):
    topics = chosen(args.topics)
    if not topics and not args.page:
        raise ValueError(f"say what to measure: {', '.join(TOPICS)}, or all; or --page, to write what was measured")
    device = choose_device(args.device)
    if device.type == "mps":
        device = torch.device("cpu")
    if args.tmp and not args.tmp.is_dir():
        raise ValueError(f"--tmp {args.tmp} is not a folder")
    about = {"run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
             "command": shlex.join(["python", "-m", "bench", *argv]), "versions": bench_page.versions()}
    others = bench_page.others() if topics else 0
    if others >= bench_page.BUSY:
        print(f"-m bench: warning: other programs keep {others:g} cores busy here", file=sys.stderr)
    failed = False
    for topic in topics:
        here = torch.device("cpu") if topic in CPU_ALONE else device
        options = SimpleNamespace(**vars(args) | {"device": here})
        records = measure(topic, options, about | {"machine": bench_page.machine(here) | {"others": others}})
        print(f"\n{TOPICS[topic][0]}\n\n{bench_page.table(records)}\n\n{bench_page.how(records[0])}; "
              f"{bench_page.where(records[0])}.\n")
        failed |= any("failed" in r["figures"] for r in records)
    if args.page:
        about = {topic: (title, inspect.getdoc(f)) for topic, (title, f) in TOPICS.items()}
        bench_page.write(args.page, bench_page.read(args.log), about)
        print(f"{args.page}: written from {args.log}")
    return int(failed)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    try:
        return run(args, argv)
    except (ValueError, OSError) as e:
        parser.error(e)
    except KeyboardInterrupt:
        parser.exit(130, "-m bench: interrupted; the rows that were finished are in the log\n")


if __name__ == "__main__":
    sys.exit(main())
