"""python -m reproduce: every item from models to its place on the page, the ablation's training, wrong input."""

import json

import pytest

from reproduce import __main__ as program
from reproduce import dd_figures, fidelity, mfx_tables, toy
from reproduce.__main__ import ITEMS
from reproduce.lab import DD, MFX, OPEN, TOY
from reproduce.mfx_tables import ALONE, FLOW, FULL, TRAINED, TRAINING
from tests.labs import make_lab, run_on_page, save_ablation


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three pictures of each, two steps: what comes out means nothing, but nothing breaks on the way."""
    folder = tmp_path_factory.mktemp("lab")
    made = make_lab(folder, inpainting_weights=program.INPAINTING, ablation_weights=save_ablation(folder / "ablation"))
    made.count = lambda full, quick: 3
    made.steps = 2
    return made


@pytest.fixture
def few_steps(monkeypatch):
    for module, name in ((mfx_tables, "STEPS"), (dd_figures, "BASELINE_STEPS"), (toy, "STEPS"), (fidelity, "STEPS")):
        monkeypatch.setattr(module, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [i.name for i in ITEMS.values() if i.chapter])
def test_every_item_runs_to_its_place_on_the_page(lab, few_steps, name):
    outcome = run_on_page(name, lab)
    assert outcome.verdict[0] != OPEN
    ITEMS[name].done.format_map(outcome.results)
    if name == "mfx_figure5":
        warps = outcome.results["warps"]
        assert warps["reference"]["holes"] == "0.0 %" and warps["reference"]["squared"] > warps["flow"]["squared"]


@pytest.mark.slow
def test_an_item_that_edits_gives_the_same_twice(tmp_path):
    """From the same seeds, with everything made anew: numbers and pictures."""
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        lab = make_lab(folder)
        lab.count, lab.steps = lambda full, quick: 2, 3
        (folder / "cache").mkdir(parents=True)
        found.append((run_on_page("figure3", lab).results, (folder / "figure3.png").read_bytes()))
    assert found[0] == found[1] and found[0][0]["n"] == 2


def test_without_its_models_an_item_is_not_measured_and_says_how_they_are_trained(tmp_path, capsys):
    names = [name for name, item in ITEMS.items() if "ablation_weights" in item.needs]
    program.main(["--quick", "--only", *names, "--out", str(tmp_path), "--ablation-weights", str(tmp_path / "none")])
    assert capsys.readouterr().out.count(f": {OPEN}. The models") == len(names) == 4
    items = json.loads((tmp_path / "results.json").read_text())["items"]
    assert all(items[name]["verdict"] == OPEN and "--train-ablation" in items[name]["why"] for name in names)
    assert "--train-ablation" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_one_command_trains_what_is_not_there_yet(tmp_path, monkeypatch, capsys):
    (tmp_path / FLOW / "model" / "scheduler").mkdir(parents=True)
    (tmp_path / FULL / "model" / "synthesizer").mkdir(parents=True)  # without a scheduler: not written to its end
    (tmp_path / ALONE).mkdir()
    (tmp_path / ALONE / "mfx-state-0000500.safetensors").touch()
    ran = []
    monkeypatch.setattr(mfx_tables.train, "main", ran.append)
    monkeypatch.setattr(mfx_tables, "make_shards", lambda folder, *_, **__: folder / "pairs")
    program.main(["--train-ablation", "--ablation-weights", str(tmp_path)])
    others = [str(tmp_path / name) for name in TRAINED if name != FLOW]
    assert [run[:4] for run in ran] == [["--out", out, "--data", str(tmp_path / "pairs")] for out in others]
    affine, alone, full = (run[4:] for run in ran)
    assert affine == ["--motion", "affine", *TRAINING] and full == [*TRAINING]
    assert alone == ["--no-cross-reference", *TRAINING, "--resume"]
    assert f"--ablation-weights {tmp_path}" in capsys.readouterr().out


def test_the_page_goes_from_paper_to_paper():
    chapters = [item.chapter for item in ITEMS.values() if item.chapter]
    assert chapters == sorted(chapters, key=[DD, MFX, TOY].index) and next(iter(ITEMS)) == "table1"


def test_wrong_input_is_one_line(tmp_path, capsys):
    none = str(tmp_path / "none")
    for arguments, said in (
        (["--only", "table9"], "invalid choice: 'table9'"), (["--only", "memory", "--weights", none], none),
        (["--images", none], none), (["--only", "memory", "--networks", none], none),
        (["--only", "memory", "--networks", str(tmp_path)], "LPIPS needs"),  # a folder without the files
        (["--only", "mfx_figure11", "--weights", none], "say which, --mfx-weights"),
        (["--only", "memory", "--inpainting-weights", none], "there is no such"),
    ):
        with pytest.raises(SystemExit) as end:
            program.main(["--quick", "--out", str(tmp_path / "out"), *arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and lines[-1].startswith("python -m reproduce: error: ") and said in lines[-1]
