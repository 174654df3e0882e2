"""The course as a student goes through it: what a lesson's page says to run runs, prints what the page shows, and
draws its figures. In this process, which has PyTorch already: `python` of a page is what main() is, below."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

from course import figures
from course.grading import COURSE, LESSONS

ROOT = COURSE.parent
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MODULES = {"sample.py": "sample", "data.py": "data", "train.py": "train", "bench": "bench.__main__",
           "course": "course.__main__", "reproduce": "reproduce.__main__"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder to run in: what the pages name is there, and what they make stays there"""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("examples", "weights"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(line):
    """A command of a page -> its exit status"""
    python, *words = shlex.split(line, comments=True)
    assert python == "python"
    name, *argv = words[1:] if words[0] == "-m" else words
    try:
        importlib.import_module(MODULES.get(name, name)).main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


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
def test_commands_run_as_written(desk, monkeypatch, capsys, lesson):
    """All but those that draw the lesson's figures, which are below."""
    monkeypatch.chdir(desk)
    for block, _ in read_blocks(lesson, "bash"):
        for line in block.strip().replace("\\\n", " ").splitlines():
            if line.startswith("python -m course.figures"):
                continue
            if re.fullmatch(rf"python -m course {lesson}", line.split("#")[0].strip()):
                assert run(line) == 1 and "not written yet" in capsys.readouterr().out
            else:
                assert run(line) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_python_prints_what_the_page_shows(desk, monkeypatch, capsys, lesson):
    """A page's blocks of Python are one program, from top to bottom."""
    monkeypatch.chdir(desk)
    names = {"__name__": "page"}
    capsys.readouterr()
    with torch.set_grad_enabled(True):  # a page may switch gradients off
        for code, shown in read_blocks(lesson, "python"):
            exec(compile(code, f"lesson{lesson}.md", "exec"), names)
            assert_shown(capsys.readouterr().out, shown)


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_figures_are_those_of_the_page(tmp_path, lesson):
    """Drawn dark: the light ones are the same in other colours, see below."""
    figures.main([str(lesson), "--dark", "--out", str(tmp_path)])
    shown = set(re.findall(r"figures/(lesson\d-[\w-]+\.png)", (COURSE / f"lesson{lesson}.md").read_text("utf-8")))
    assert {path.name for path in tmp_path.iterdir()} == {name.replace(".png", "-dark.png") for name in shown}
    assert all((figures.FOLDER / name).exists() for name in shown)


@pytest.mark.slow
def test_as_processes(tmp_path):
    for argv, status in ((["course", "5"], 1), (["course.figures", "5", "--out", tmp_path], 0)):
        done = subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and not done.stderr, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"lesson5-{name}.png" for name in ("row", "disc", "slope")}
