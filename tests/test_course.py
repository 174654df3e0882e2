"""The course's exercises: a stub is not written yet, a solution is right, a likely mistake is named; and its pages."""

import importlib
import re
import sys
import types

import numpy as np
import pytest
import torch

from course import __main__ as program
from course.grading import COURSE, LESSONS, Wrong, compare, grade, list_checks, predicted, read_answers

EXERCISES = [(lesson, name) for lesson in LESSONS for name in list_checks(lesson)]


def named(module, **changes):
    return types.SimpleNamespace(**(vars(module) | changes))


@pytest.mark.parametrize("lesson, name", EXERCISES, ids=lambda x: str(x))
def test_an_exercise(lesson, name):
    check = list_checks(lesson)[name]
    stub, solved = (read_answers(lesson, folder) for folder in ("exercises", "solutions"))
    assert grade(check, stub) == "not written yet"
    assert grade(check, solved) == "right"
    mistakes = importlib.import_module(f"course.checks.lesson{lesson}").MISTAKES[name]
    assert len(mistakes) >= 3
    for wrong, words in mistakes:
        said = grade(check, named(solved, **{name: wrong}))
        assert words in said and not said.startswith("it stops"), said


@pytest.mark.parametrize("lesson, name, helper", [
    (2, "sample", "ddim_step"), (3, "denoise_guided", "guide"), (4, "differential_diffusion", "keep_mask"),
    (8, "paired_difference", "standard_error"),
])
def test_an_exercise_that_calls_one_that_is_not_written(lesson, name, helper):
    check = list_checks(lesson)[name]
    mixed = types.ModuleType("answers")
    exec((COURSE / f"solutions/lesson{lesson}.py").read_text(encoding="utf-8"), vars(mixed))
    assert grade(check, mixed) == "right"
    setattr(mixed, helper, getattr(read_answers(lesson, "exercises"), helper))
    assert grade(check, mixed) == f"write {helper} first: this one calls it"


def test_numbers_of_numpy_are_numbers():
    x = torch.arange(12.0).sqrt()
    compare(np.std(x.numpy(), ddof=1) / np.float32(12**0.5), x.std().item() / 12**0.5)
    predicted(np.float32(2), 2)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_is_whole(lesson):
    names = [name for number, name in EXERCISES if number == lesson]
    assert 4 <= len(names) <= 6
    assert set(names) == set(importlib.import_module(f"course.checks.lesson{lesson}").MISTAKES)
    text = (COURSE / f"lesson{lesson}.md").read_text(encoding="utf-8")
    assert f"python -m course {lesson}\n" in text and f"python -m course.figures {lesson}\n" in text
    for name in names:
        assert f"`{name}`" in text, f"the page does not speak of {name}"


def test_every_question_has_an_answer():
    answers = re.split(r"^## Lesson \d+$", (COURSE / "answers.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    asked = [(COURSE / f"lesson{lesson}.md").read_text(encoding="utf-8").count("> **Question.**") for lesson in LESSONS]
    assert [len(re.findall(r"^\d+\. ", text, re.M)) for text in answers] == asked


def test_committed_figures_are_small_and_light():
    figures = [path for path in COURSE.glob("figures/*.png") if not path.stem.endswith("-dark")]
    assert sum(path.stat().st_size for path in figures) <= 3e6


def test_mistakes_that_can_be_made_anywhere():
    want = torch.arange(24.0).view(2, 3, 4) + torch.tensor([0.0, 5, 1, 3])
    square = want[:, :, :3]
    for words, got, expected in [
        ("shape is (2, 3)", want[..., 0], want),
        ("sign", -want, want),
        ("0.5 times", want / 2, want),
        ("2 more", want + 2, want),
        ("too early", want.roll(-1, 2), want),
        ("too late", want.roll(1, 1), want),
        ("not finite", want / 0, want),
        ("at [1, 2, 1] it is 0", torch.where(want == want.max(), 0.0, want), want),
        ("swapped", square.mT, square),
        ("True where False", want > 9, want <= 9),
        ("a str", "a", want),
        ("a tuple", (want, want), want),
        ("2 things", want, (want, want)),
        ("order", (want, -want), (-want, want)),
        ("number 2 of the 2: the sign", (want, -want), (want, want)),
    ]:
        with pytest.raises(Wrong, match=re.escape(words)):
            compare(got, expected)
    with pytest.raises(Wrong, match="one too many"):
        predicted(36, 35)


def test_a_student_sees_no_traceback(capsys, monkeypatch):
    def broken(*_):
        return torch.zeros(2) + torch.zeros(3)

    stub = read_answers(1, "exercises")
    leaves = named(stub, noise_latent=lambda *_: sys.exit(0))
    assert grade(list_checks(1)["noise_latent"], leaves).startswith("it stops")
    assert grade(list_checks(1)["noise_latent"], named(stub, noise_latent=broken)).startswith("it stops")
    monkeypatch.setattr(program, "read_answers", lambda *_: stub)
    with pytest.raises(SystemExit) as stop:
        program.main(["1"])
    assert stop.value.code == 1 and "0 of 6 right" in capsys.readouterr().out
