"""The course as a student goes through it: what a lesson's page says to run runs, prints what the page shows, and
draws its figures."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from course.figures import FOLDER
from course.grading import COURSE, LESSONS

ROOT = COURSE.parent
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project, to write in"""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns(".git", "runs", "reproduced", "__pycache__", ".venv")
    return shutil.copytree(ROOT, folder / "project", ignore=ignored)


def run(command, folder):
    """A command of a page, with `python` this one -> its exit status, and all that it prints"""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def read_blocks(lesson, kind):
    """-> the page's blocks of `kind`, each with the ```text block right under it, or ''"""
    page = (COURSE / f"lesson{lesson}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```(?:\s*```text\n(.*?)```)?", page, re.S)


def assert_shown(printed, shown):
    """The same words; numbers to a unit of the last digit that is shown"""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    for got, want in zip(NUMBER.findall(printed), NUMBER.findall(shown)):
        digits = len(want.partition(".")[2])
        assert abs(float(got) - float(want)) <= 1.01 * 10**-digits * bool(digits), printed


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_commands_run_as_written(copy, lesson):
    for block, _ in read_blocks(lesson, "bash"):
        for line in block.strip().replace("\\\n", " ").splitlines():
            status, printed = run(["bash", "-c", line], copy)
            if re.fullmatch(rf"python -m course {lesson}", line.split("#")[0].strip()):
                assert status == 1 and "not written yet" in printed and "Traceback" not in printed, printed
            else:
                assert status == 0, f"{line}\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_python_prints_what_the_page_shows(copy, lesson):
    """A page's blocks of Python are one program, from top to bottom."""
    blocks = read_blocks(lesson, "python")
    program = "".join(f"{code}\nprint('=====', flush=True)\n" for code, _ in blocks)
    (copy / "page.py").write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (_, shown), printed in zip(blocks, done.stdout.split("=====\n"), strict=False):
        assert_shown(printed, shown)


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_figures_are_made_light_and_dark(tmp_path, lesson):
    """And they are those that the page shows and the repository has."""
    for option in ([], ["--dark"]):
        command = [sys.executable, "-m", "course.figures", str(lesson), *option, "--out", str(tmp_path)]
        assert run(command, ROOT)[0] == 0
    light = {path.name for path in tmp_path.glob(f"lesson{lesson}-*.png") if not path.stem.endswith("-dark")}
    dark = {path.name for path in tmp_path.glob(f"lesson{lesson}-*-dark.png")}
    shown = set(re.findall(r"figures/(lesson\d-[\w-]+\.png)", (COURSE / f"lesson{lesson}.md").read_text("utf-8")))
    assert light == shown and {name.replace(".png", "-dark.png") for name in light} == dark
    assert all((FOLDER / name).exists() for name in light)
