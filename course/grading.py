"""How an exercise is checked: what a student's function returns is compared, and what is wrong is said in words.

A lesson's check of the exercise `ddim_step` is a function of the module that holds the student's `ddim_step`:

    def check_ddim_step(module):
        z, eps = draw((2, 3, 4, 4), (2, 3, 4, 4))
        compare_function(module.ddim_step, solution.ddim_step, {
            "it goes from the next level to this one: the two are the wrong way round": a wrong function,
        }, z, eps, 0.5, 0.8)

    def check_PREDICT_CALLS(module):
        predicted(module.PREDICT_CALLS, 35, {"that is Algorithm 1: ...": 50})

`call` and `predicted` say whether anything is written yet. `compare` knows the mistakes that can be made anywhere
(shape, sign, scale, off by one step), and takes those of this exercise as {sentence: what the mistake would give}.
"""

import contextlib
import importlib
import numbers
import traceback
from pathlib import Path

import torch

COURSE = Path(__file__).parent
LESSONS = sorted(int(path.stem.removeprefix("lesson")) for path in COURSE.glob("checks/lesson*.py"))


class Wrong(Exception):
    """What is wrong with an answer, as a sentence."""


class NotWritten(Exception):
    """The stub is as it was."""


# ---------------------------------------------------------------------------------------------------------------------
# What a check calls


def draw(*shapes, how=torch.randn):
    """Standard normal tensors, the same every time"""
    g = torch.Generator().manual_seed(7)
    return [how(shape, generator=g) for shape in shapes]


def draw_uniform(*shapes):
    """Uniform in 0 .. 1"""
    return draw(*shapes, how=torch.rand)


def call(function, *inputs, **options):
    """The student's function on copies of the inputs -> what it returns. Wrong, if it changes an input."""
    given = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    result = function(*given, **options)
    if result is None:
        raise NotWritten
    for i, (before, after) in enumerate(zip(inputs, given), 1):
        if torch.is_tensor(before) and not torch.equal(before, after):
            raise Wrong(f"it changes its input number {i} in place: work on a copy")
    return result


@contextlib.contextmanager
def resting_on(helper, *inputs, called=()):
    """Around the check of an exercise that calls an earlier one: if that one returns nothing yet, it says so.

    called  not empty once the exercise has called something: then it is written, though it returns None
    """
    try:
        yield
    except Exception as stopped:
        if isinstance(stopped, NotWritten) and not called:
            raise
        try:
            missing = helper(*inputs) is None
        except Exception:
            missing = False
        if missing:
            raise Wrong(f"write {helper.__name__} first: this one calls it") from None
        raise


def compare(got, want, slips=None, tolerance=1e-4):
    """Wrong, with a sentence, unless `got` is `want`: a tensor, a number, a bool, a string, or a list or tuple of these

    slips      {sentence: what an answer with this mistake would be}
    tolerance  of the largest difference, relative to the largest of `want`
    """
    if same(got, want, tolerance):
        return
    for sentence, wrong in (slips or {}).items():
        if same(got, wrong, tolerance):
            raise Wrong(sentence)
    if is_several(want):
        compare_several(got, want, tolerance, lambda g, w: compare(g, w, tolerance=tolerance))
    if isinstance(want, str) or is_several(want):
        raise Wrong(f"it is {got!r:.80}, and {want!r:.80} is expected")
    if not isinstance(got, (torch.Tensor, numbers.Real)):
        raise Wrong(f"it is a {type(got).__name__}, where {describe(want)} is expected")
    raise Wrong(diagnose(torch.as_tensor(got), torch.as_tensor(want), tolerance))


def compare_function(function, right, wrong, *inputs, tolerance=1e-4):
    """The student's function beside the right one. wrong  {sentence: a function with this mistake}"""
    slips = {sentence: mistaken(*inputs) for sentence, mistaken in wrong.items()}
    compare(call(function, *inputs), right(*inputs), slips, tolerance)


def list_mistakes(wrong):
    """compare_function's `wrong`, as MISTAKES has it: each must get its own sentence"""
    return [(mistaken, sentence) for sentence, mistaken in wrong.items()]


def predicted(got, want, slips=None, within=0.0):
    """What a student writes down before running, a number, string, bool or tuple of numbers: None is not written yet.

    within  how far from `want` a number may be; for a number, more or less is said
    """
    if got is None:
        raise NotWritten
    if isinstance(want, (str, bool)):
        compare(got, want, slips)
        return
    if is_several(want):
        for sentence, wrong in (slips or {}).items():
            if same(got, wrong, 0):
                raise Wrong(sentence)
        compare_several(got, want, 0, predicted)
        return
    if isinstance(got, bool) or not isinstance(got, numbers.Real):
        raise Wrong(f"it is {got!r:.80}, where a number is expected")
    if abs(got - want) <= within + 1e-9:
        return
    for sentence, wrong in (slips or {}).items():
        if abs(got - wrong) <= within + 1e-9:
            raise Wrong(sentence)
    if isinstance(want, int) and abs(got - want) == 1:
        raise Wrong(f"off by one: {got} is one too {'many' if got > want else 'few'}")
    raise Wrong(f"{got:g} is too {'large' if got > want else 'small'}: run it, look, and explain the difference")


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong anywhere


def is_several(x):
    return isinstance(x, (list, tuple))


def same(got, want, tolerance):
    if is_several(want):
        return is_several(got) and len(got) == len(want) and all(same(g, w, tolerance) for g, w in zip(got, want))
    if isinstance(want, str):
        return got == want
    if not isinstance(got, (torch.Tensor, numbers.Real)):  # NumPy's numbers are Real
        return False
    got, want = torch.as_tensor(got).detach().double().cpu(), torch.as_tensor(want).double().cpu()
    if got.shape != want.shape:
        return False
    return bool(((got - want).abs() <= tolerance * largest(want)).all())


def largest(x):
    return max(x.abs().max().item(), 1e-6) if x.numel() else 1.0


def describe(x):
    if torch.is_tensor(x):
        return f"a tensor {tuple(x.shape)}"
    return f"{'an' if isinstance(x, int) else 'a'} {type(x).__name__}"


def compare_several(got, want, tolerance, compare_one):
    """Wrong for a list or tuple of another length, in another order, or with one wrong entry"""
    if not is_several(got):
        raise Wrong(f"it returns {describe(got)}, where {len(want)} things are expected, one after another")
    if len(got) != len(want):
        raise Wrong(f"it returns {len(got)} things, where {len(want)} are expected")
    if same(got[::-1], want, tolerance):
        raise Wrong("the order is the wrong way round")
    if isinstance(want, tuple):
        for i, (g, w) in enumerate(zip(got, want), 1):
            try:
                compare_one(g, w)
            except Wrong as e:
                raise Wrong(f"number {i} of the {len(want)}: {e}") from None


def diagnose(got, want, tolerance):
    """Two tensors that differ -> a sentence"""
    if got.shape != want.shape:
        return f"the shape is {tuple(got.shape)}, and {tuple(want.shape)} is expected"
    if want.dtype == torch.bool and same(~got.bool(), want, tolerance):
        return "it is the wrong way round: True where False is expected, and False where True is"
    got, want = got.detach().double().cpu() + 0.0, want.double().cpu() + 0.0  # -0 is 0
    if not got.isfinite().all():
        return "there are values that are not finite: is something divided by zero?"
    if same(-got, want, tolerance):
        return "the sign is wrong: all of it is minus what is expected"
    if same(got.mT if got.ndim > 1 else got, want, tolerance):
        return "rows and columns are the wrong way round: the last two dimensions are swapped"
    for dim, length in enumerate(got.shape):
        if length > 2 and same(got.narrow(dim, 1, length - 1), want.narrow(dim, 0, length - 1), tolerance):
            return f"off by one step: along dimension {dim} everything comes one place too late"
        if length > 2 and same(got.narrow(dim, 0, length - 1), want.narrow(dim, 1, length - 1), tolerance):
            return f"off by one step: along dimension {dim} everything comes one place too early"
    scale = (got * want).sum().item() / max((want * want).sum().item(), 1e-12)
    # One number is always so many times another: there only a whole factor says something, as n for a mean.
    factor = max(abs(scale), 1 / max(abs(scale), 1e-12))
    if scale and same(got / scale, want, tolerance) and (want.numel() > 1 or abs(factor - round(factor)) < 1e-3):
        return f"the scale is wrong: it is {scale:.4g} times what is expected"
    shift = (got - want).mean().item()
    if same(got - shift, want, tolerance) and want.numel() > 1:
        return f"a constant is added: everything is {shift:.4g} more than expected"
    difference = (got - want).abs()
    place = (difference == difference.max()).nonzero()[0].tolist()
    where = f"at {place} " if place else ""
    return f"{where}it is {got[tuple(place)]:.4g}, and {want[tuple(place)]:.4g} is expected"


# ---------------------------------------------------------------------------------------------------------------------
# Running a lesson's checks


def list_checks(lesson):
    """-> {name of an exercise: its check}, in the order of the file"""
    checks = importlib.import_module(f"course.checks.lesson{lesson}")
    return {name.removeprefix("check_"): check for name, check in vars(checks).items() if name.startswith("check_")}


def grade(check, module):
    """-> 'right', 'not written yet', or a sentence. Whatever a student's function does, it is no traceback."""
    try:
        check(module)
    except NotWritten:
        return "not written yet"
    except Wrong as e:
        return str(e)
    except (Exception, SystemExit) as e:
        said = str(e).strip().splitlines() or ["no reason is given"]
        file = getattr(module, "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        where = f"in line {lines[-1]}" if lines else "before it returns"
        return f"it stops {where}: {type(e).__name__}: {said[0]:.200}"
    return "right"


def read_answers(lesson, folder):
    """The module of answers: folder 'exercises' or 'solutions'. ValueError for a file that Python cannot read."""
    path = COURSE / folder / f"lesson{lesson}.py"
    try:
        return importlib.import_module(f"course.{folder}.lesson{lesson}")
    except SyntaxError as e:
        raise ValueError(f"{path}, line {e.lineno}: {e.msg}") from None
    except (Exception, SystemExit) as e:  # whatever stands at the top of a student's file
        said = str(e).strip().splitlines() or ["no reason is given"]
        raise ValueError(f"{path} cannot be read: {type(e).__name__}: {said[0]:.200}") from None
