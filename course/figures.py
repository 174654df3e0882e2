"""The figures of a lesson, as PNGs for its page and for slides.

    python -m course.figures 4             course/figures/lesson4-*.png
    python -m course.figures 4 --dark      the same for a dark slide: lesson4-*-dark.png
"""

import importlib
from pathlib import Path

import torch

from common.cli import Parser, folder_name, number, report_errors, tell
from course.grading import LESSONS

FOLDER = Path(__file__).parent / "figures"


def main(argv=None):
    parser = Parser(prog="python -m course.figures", description=__doc__)
    parser.add_argument("lesson", type=number(int, LESSONS[0], LESSONS[-1]))
    parser.add_argument("--dark", action="store_true", help="for a dark slide")
    parser.add_argument("--out", type=folder_name, default=FOLDER, help="a folder; made if it is not there")
    args = parser.parse_args(argv)
    with report_errors(parser, "close other programs", "a figure appears whole or not at all"):
        args.out.mkdir(parents=True, exist_ok=True)
        draw = importlib.import_module(f"course.draw.lesson{args.lesson}").draw
        with torch.inference_mode():
            for path in draw(args.out, args.dark):
                tell(path)


if __name__ == "__main__":
    main()
