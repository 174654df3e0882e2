"""A few kills, and full disks, of each program at every run of the slow tests; kill.py does many."""

import random

import pytest

from tests.robust import kill


@pytest.mark.slow
@pytest.mark.parametrize("how", kill.HOW)
@pytest.mark.parametrize("program", kill.PROGRAMS)
def test_disturbed_and_gone_on_with_it_ends_as_if_nothing_had_been(program, how, tmp_path):
    times = {"kill": 3, "full": 2, "two": 1}[how]
    assert len(kill.HOW[how](tmp_path, kill.PROGRAMS[program], times, random.Random(program))) == times
