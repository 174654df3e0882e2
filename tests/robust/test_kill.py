"""A few kills of each program at every run of the slow tests; kill.py does many."""

import random

import pytest

from tests.robust import kill


@pytest.mark.slow
@pytest.mark.parametrize("name", kill.CAMPAIGNS)
def test_killed_and_gone_on_with_it_ends_as_if_nothing_had_been(name, tmp_path):
    assert len(kill.CAMPAIGNS[name](tmp_path, 3, random.Random(name))) == 3
