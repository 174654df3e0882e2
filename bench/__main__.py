"""Speed and memory beside what one would use instead.

    python -m bench                          the topics, and what each of them measures
    python -m bench edit mfx --model toy     a minute or two on a laptop
    python -m bench unet --dtype bf16 --batch 1,2 --rounds 3
    python -m bench splat --device cuda

Ours and the peer have the same weights and the same inputs, and are called in turn. A row shows the median of both, the
ratio ours / peer's (below 1: ours is faster), its spread over the rounds, and how far the two results differ, relative
to the largest number in them. Without --rounds there are five, and fewer of what is slow. An idle machine measures
best. Where a peer is not installed our time stands alone. Weights that are not shipped are random: nothing is
downloaded.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("python -m bench")

import datetime
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench import edits, large, models, warp
from bench.clock import HEADER, format_row
from common.cli import Parser, number, report_errors
from common.devices import choose_device

# {name: function of the options that yields Rows; its docstring says what is measured}
TOPICS = models.TOPICS | edits.TOPICS | warp.TOPICS | large.TOPICS
WIDTHS = 66, 9, 9, 5, 16, 10, 0  # of the columns of HEADER
PACKAGES = ("torch", "diffusers", "transformers")


def read_numbers(text):
    return [number(int, 1, 4096)(part) for part in text.split(",")]


def parse(argv):
    parser = Parser(prog="python -m bench", description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="NAME", help=", ".join(TOPICS))
    parser.add_argument("--rounds", type=number(int, 1, 1000), help="timed calls of each (default: 5, fewer if slow)")
    parser.add_argument("--model", choices=["toy", "full"], help="one alone: the toy, or Stable Diffusion 1.4's size")
    parser.add_argument("--steps", type=number(int, 1, 1000), help="of edits (default: 50 of the toy, 4 at full size)")
    parser.add_argument("--batch", type=read_numbers, metavar="N,N", help="unet, vae: batch sizes")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "auto"], help="one alone; auto: what sample.py takes here")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args(argv)
    for name in args.topics:
        if name not in TOPICS:
            parser.error(f"there is no topic {name!r}: choose {', '.join(TOPICS)}")
    return parser, args


def describe_machine(device):
    """What every number depends on -> text: machine, load, commit, date, versions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    machine = names[0] if names else platform.machine()
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else "unknown"
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in installed]
    return (f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
            f"{datetime.date.today()}, code at {commit}; {', '.join(versions)}")


def print_cells(cells):
    print("  ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS)).rstrip(), flush=True)


def main(argv=None):
    parser, args = parse(argv)
    if not args.topics:
        for name, topic in TOPICS.items():
            print(f"{name:9} {inspect.getdoc(topic).splitlines()[0]}")
        return
    with report_errors(parser, "fewer topics, or --model toy", "nothing is kept but the rows above"):
        measure(args)


def measure(args):
    """Print the rows of each topic that is asked for."""
    device = choose_device(args.device)
    if device.type == "mps":
        device = torch.device("cpu")
    print(describe_machine(device))
    for name in dict.fromkeys(args.topics):
        args.device = device
        print(f"\n{name}: {inspect.getdoc(TOPICS[name])}\n")
        print_cells(HEADER)
        for row in TOPICS[name](args):
            print_cells(format_row(row))


if __name__ == "__main__":
    sys.exit(main())
