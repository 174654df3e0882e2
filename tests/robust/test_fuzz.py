"""A few hundred damaged files of every kind keep the promise of tests/robust/fuzz.py, and that would see it broken."""

import sys

import pytest

from tests.robust import fuzz

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_told_or_read(kind):
    counts, found = fuzz.count(fuzz.watch(kind, seed=0, cases=40))
    assert not found, counts


@pytest.mark.slow
def test_what_breaks_the_promise_is_found():
    """No code, no hang, no crash, no 3 GB, no temporary file, no message of two lines, no other error goes unseen."""
    outcomes = set(fuzz.watch("planted", seed=1445, cases=9).values())  # of this seed one of each
    for found in ("traceback damage.py:<lambda>", "more than 10 s", "half-written", "2 lines: one", "code ran",
                  "died with", "more than 3 GB"):  # fmt: skip
        assert any(outcome.startswith(found) for outcome in outcomes), found
    assert {"read", "told"} <= outcomes
