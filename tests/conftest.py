"""python -m pytest runs the quick tests, python -m pytest --all also those that are marked slow."""

import pytest

import bench.peers  # noqa: F401, makes torchvision importable where it was built for another PyTorch
import mfx
import sd
from tests import small


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Small models of 16x16 pixels, a folder each: sd1, sd2, an XL's base and refiner. No test writes to them."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd1", "sd2"):
        sd.save(small.stable_diffusion(kind), folder / kind)
    for kind in ("base", "refiner"):
        sd.save(small.stable_diffusion_xl(kind), folder / kind)
    return folder


@pytest.fixture
def short_sheets(monkeypatch):
    """A training's sheets are sampled in two steps."""
    sample = mfx.MagicFixup.sample
    monkeypatch.setattr(mfx.MagicFixup, "sample", lambda self, *edits, steps: sample(self, *edits, steps=2))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about two seconds; run by --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --all"))
