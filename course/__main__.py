"""Checks the exercises of a lesson, and says in words what is wrong.

    python -m course 4                     what you wrote in course/exercises/lesson4.py
    python -m course 4 --solutions         the same checks on course/solutions/lesson4.py
    python -m course                       all lessons

The exit status is 0 only if all is right.
"""

import sys

from common.cli import Parser, number, report_errors, tell
from course.grading import LESSONS, grade, list_checks, read_answers


def check_lesson(lesson, folder):
    """Prints a line for each exercise -> whether all are right"""
    module = read_answers(lesson, folder)
    tell(f"lesson {lesson}: course/{folder}/lesson{lesson}.py")
    checks = list_checks(lesson)
    width = max(map(len, checks))
    right = 0
    for name, check in checks.items():
        verdict = grade(check, module)
        right += verdict == "right"
        tell(f"  {name:{width}}  {verdict}")
    tell(f"  {right} of {len(checks)} right")
    return right == len(checks)


def main(argv=None):
    parser = Parser(prog="python -m course", description=__doc__)
    parser.add_argument("lesson", nargs="*", type=number(int, LESSONS[0], LESSONS[-1]), help="its number; none: all")
    parser.add_argument("--solutions", action="store_true", help="check the solutions, not the exercises")
    args = parser.parse_args(argv)
    with report_errors(parser, "close other programs"):
        folder = "solutions" if args.solutions else "exercises"
        verdicts = [check_lesson(lesson, folder) for lesson in args.lesson or LESSONS]
    sys.exit(0 if all(verdicts) else 1)


if __name__ == "__main__":
    main()
