"""-m reproduce's own parts: metrics on made-up data, what is kept and what is run again, the page, a run end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffdiff
from reproduce import __main__ as reproduce
from reproduce import baselines as compositing
from reproduce import charts
from reproduce import dd_tables as claims_dd
from reproduce import lab as claims
from reproduce import report as page
from reproduce.lab import FALSE, OPEN, PART, TRUE, Item, Outcome, judge

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def a_map(seed=0):
    return torch.rand(16, 16, generator=torch.Generator().manual_seed(seed))


def test_cam_of_a_perfect_edit_is_1_and_dam_0_whatever_the_scale():
    M = a_map()
    assert diffdiff.cam(M, -3 * M + 7) == pytest.approx(1, abs=1e-6)
    assert diffdiff.dam(M, -3 * M + 7) == pytest.approx(0, abs=1e-5)
    assert diffdiff.cam(M, 2 * M - 1) == pytest.approx(-1, abs=1e-6)  # the opposite of what was asked for ...
    assert diffdiff.dam(M, 2 * M - 1) == pytest.approx(0, abs=1e-5)  # ... which only CAM notices


def test_dam_is_the_least_squares_that_it_says_it_is():
    M, E = a_map(1), a_map(2)
    design = torch.stack([E.flatten().double(), torch.ones(256, dtype=torch.double)], 1)
    residual = M.flatten().double() - design @ torch.linalg.lstsq(design, M.flatten().double()[:, None]).solution[:, 0]
    assert diffdiff.dam(M, E) == pytest.approx(residual.norm().item(), rel=1e-9)
    closed = (M - M.mean()).double().norm().item() * (1 - diffdiff.cam(M, E) ** 2) ** 0.5
    assert diffdiff.dam(M, E) == pytest.approx(closed, rel=1e-6)
    assert diffdiff.dam(M, torch.ones(16, 16)) == pytest.approx((M - M.mean()).norm().item(), rel=1e-5)  # no change


def test_edit_strength_map_takes_off_what_a_black_map_measures():
    bias, M = a_map(3), a_map(4)
    noise = 0.01 * torch.randn(50, 16, 16, generator=torch.Generator().manual_seed(5))
    E = diffdiff.edit_strength_map(bias + 1 - M + noise, (bias + 1).expand(50, 16, 16))
    assert diffdiff.cam(M, E) > 0.99 > diffdiff.cam(M, (bias + 1 - M)) + 0.1
    assert E.max() < 0.01  # nothing changes by more than under a black map
    shaped = diffdiff.edit_strength_map((1 - M).expand(3, 1, 16, 16), torch.ones(3, 1, 16, 16))
    assert shaped.shape == (16, 16)
    with pytest.raises(ValueError, match="same pairs"):
        diffdiff.edit_strength_map(torch.zeros(3, 16, 16), torch.zeros(2, 16, 16))


def test_soft_edges_grow_with_blur_and_not_with_contrast():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 20:40, 16:48] = 1
    blurred = diffdiff.soft_inpainting_map(x.view(3, 64, 64), 3).view(1, 3, 64, 64)
    sharp, soft, faint = (diffdiff.soft_edges(y).item() for y in (x, blurred, 0.1 * x))
    assert sharp < 0.3 < 0.5 < soft <= 1
    assert faint == pytest.approx(sharp, abs=1e-6)
    there = torch.zeros(1, 1, 64, 64)
    there[..., :10] = 1  # nothing to see there
    assert diffdiff.soft_edges(x, there).item() == 1
    stripes = (torch.arange(64) // 16 % 2).float().expand(1, 3, 64, 64)  # sharp, and none at all from above to below
    assert diffdiff.soft_edges(stripes).item() < 0.3


def test_toy_distance_is_zero_for_the_same_and_lies_where_pictures_differ():
    lab = claims.Lab(options())
    x = lab.images(1)
    y = x.clone()
    y[..., 80:112, 80:112] *= -1
    with torch.inference_mode():
        assert claims.toy_distance(lab.model.vae, x, x).abs().max() <= 1e-9  # both are in one batch, at two places
        d = claims.toy_distance(lab.model.vae, x, y)
    assert d.shape == (1, 1, 128, 128)
    assert d[..., 80:112, 80:112].mean() > 5 * d[..., :64, :64].mean()


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and patterns


def test_bootstrap_weights_sum_to_one_and_are_always_the_same():
    a = claims.resampled(9, draws=20)
    assert a.shape == (20, 9) and torch.equal(a, claims.resampled(9, draws=20))
    torch.testing.assert_close(a.sum(1), torch.ones(20))


def test_verdicts_join_the_parts_of_a_claim():
    yes, no = (True, "it is"), (False, "it is not")
    assert judge(yes, yes)[0] == TRUE and judge(no)[0] == FALSE and judge(yes, no)[0] == PART
    assert judge(yes, no)[1] == "It is. But: it is not."


@pytest.mark.parametrize("name", claims_dd.PATTERNS)
def test_thresholds_cut_each_pattern_into_different_masks(name):
    mu = claims_dd.pattern(name, 64)
    assert mu.min() == 0 and mu.max() == 1
    masks = [(mu > t).float() for t in claims_dd.THRESHOLDS[name]]
    assert all(not torch.equal(a, b) and (a >= b).all() for a, b in zip(masks, masks[1:]))
    assert all(0 < m.mean() < 1 for m in masks)


@pytest.mark.parametrize("paste", [compositing.alpha, compositing.poisson, compositing.laplace])
def test_compositing_keeps_the_original_outside_and_what_is_the_same_everywhere(paste):
    rng = np.random.default_rng(0)
    original = rng.integers(60, 200, (64, 64, 3), dtype=np.uint8)
    mu = np.ones((64, 64), np.float32)
    mu[20:44, 20:44] = 0
    edited = np.full_like(original, 128)
    out = paste(original, edited, mu)
    assert out.dtype == np.uint8 and out.shape == original.shape
    assert np.abs(out[:4].astype(int) - original[:4]).max() <= 2
    assert out[28:36, 28:36].std() < 12 < original.std()  # flat, as the edit is
    assert np.abs(paste(original, original, mu).astype(int) - original).max() <= 2


# ---------------------------------------------------------------------------------------------------------------------
# Kept results


def options(**others):
    usual = dict(weights=reproduce.sample.TOY, mfx_weights=None, inpainting_weights=None, images=None, quick=True,
                 networks=None, prompt="snow at night", out=".")
    return SimpleNamespace(**usual | others)


def helper():
    return 1


def another_helper():
    return 2


def probe(lab):
    return Outcome({"value": helper()})


def an_item(run=probe, **rest):
    return Item("probe", "Figure 0", "A claim. And more.", "Done.", run, lambda r, t: (TRUE, "so"),
                lambda r, t: [["value"], [str(r["value"])]], 1.0, **rest)


def test_a_digest_changes_with_options_weights_and_code_that_is_called(monkeypatch):
    monkeypatch.setattr(reproduce, "HERE", Path(__file__).parent)  # code of ours is what lies there
    first = reproduce.digest_of(an_item(), {"quick": True, "weights": "a"})
    assert first == reproduce.digest_of(an_item(), {"quick": True, "weights": "a"})
    assert first != reproduce.digest_of(an_item(), {"quick": False, "weights": "a"})
    assert first != reproduce.digest_of(an_item(), {"quick": True, "weights": "b"})
    other = {"quick": True, "weights": "a", "mfx_weights": "c"}  # which it does not need
    assert first == reproduce.digest_of(an_item(), other)
    monkeypatch.setitem(globals(), "helper", another_helper)
    assert first != reproduce.digest_of(an_item(), {"quick": True, "weights": "a"})


def test_digests_are_the_same_in_every_process():
    """What holds an address, or has no order, would make a run that was stopped begin anew."""
    told = ("from reproduce import __main__ as reproduce, lab; "
            "print([reproduce.digest_of(i, {}) for i in lab.ITEMS.values()])")
    done = [subprocess.run([sys.executable, "-c", told], cwd=reproduce.HERE, env=os.environ | {"PYTHONHASHSEED": seed},
                           capture_output=True, text=True, check=True).stdout for seed in "12"]
    assert done[0] == done[1] and done[0].count(",") == len(claims.ITEMS) - 1


def test_the_source_of_an_item_holds_what_it_calls():
    code = reproduce.source(claims.ITEMS["table1"].run)
    assert code["reproduce.dd_tables.table1"].startswith("def table1(lab)")  # its claim may change
    called = {"dd_tables.table1", "dd_tables.distances", "dd_tables.THRESHOLDS", "lab.resampled", "charts"}
    assert {f"reproduce.{name}" for name in called} | {"diffdiff", "diffusion"} <= set(code)
    assert any("lambda" in text for text in code.values())  # those in STRENGTH


def test_a_finished_item_is_read_back_and_one_that_lost_its_picture_is_not(tmp_path):
    lab = claims.Lab(options(out=tmp_path))
    (tmp_path / "cache").mkdir()

    def drawn(lab):
        lab.save(Image.new("RGB", (8, 8)), "probe.png")
        return Outcome({"value": 0.5}, [("probe.png", "a picture")], {"seconds": 2.0})

    outcome, seconds = reproduce.run_item(an_item(drawn), lab, "digest")
    again, same = reproduce.kept(an_item(drawn), "digest", tmp_path)
    assert again == outcome and same == seconds
    assert reproduce.kept(an_item(drawn), "another", tmp_path) is None
    (tmp_path / "probe.png").unlink()
    assert reproduce.kept(an_item(drawn), "digest", tmp_path) is None
    (tmp_path / "cache" / "probe.json").write_text("{")
    assert reproduce.kept(an_item(drawn), "digest", tmp_path) is None


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(picture)
    outcome = Outcome({"value": "<b>&</b>"}, [(picture, 'a "caption" <i>')], {})
    entries = [page.Entry(an_item(), outcome, verdict, "<script>why</script>", 3.2, "python -m reproduce --only probe")
               for verdict in (TRUE, PART, FALSE, OPEN)]
    text = page.page(entries, {"weights": "<toy>"}, ["figure9"])
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "http" not in text.replace("http-equiv", "")
    assert "<script" not in text and "<b>" not in text and "&lt;b&gt;&amp;" in text and "&lt;toy&gt;" in text
    assert "@media print" in text and "figure9" in text
    for tag in ("section", "table", "figure", "dl", "div", "span", "main"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_charts_and_sheets_have_the_size_that_they_say():
    series = [("a", [0, 1, 2], [1.0, 2.0, 3.0], {"dots": True, "line": True}), ("", [0, 2], [1, 3], {})]
    chart = charts.chart(series, "steps", "seconds", size=(300, 200))
    assert chart.size == (600, 400) and len(chart.getcolors(1 << 16)) > 10
    a = Image.new("RGB", (64, 64), "red")
    drawn = charts.sheet([[a, None], [a, a]], ["one", "a rather long label over a narrow cell"], ["x", "y"], cell=64)
    assert drawn.width > 2 * 64 and drawn.height > 2 * 64
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


# ---------------------------------------------------------------------------------------------------------------------
# End to end


def test_a_cheap_item_from_command_to_page_twice_the_same_and_not_run_again(tmp_path, capsys, monkeypatch):
    command = ["--quick", "--only", "figure26", "--out", str(tmp_path / "a")]
    reproduce.main(command)
    assert "Figure 26: came true" in capsys.readouterr().out
    first = (tmp_path / "a" / "results.json").read_bytes()
    assert set(json.loads(first)["items"]) == {"figure26"}
    assert "figure26" in json.loads((tmp_path / "a" / "timings.json").read_text())
    assert "data:image/" in (tmp_path / "a" / "index.html").read_text(encoding="utf-8")

    reproduce.main([*command[:-1], str(tmp_path / "b")])
    assert (tmp_path / "b" / "results.json").read_bytes() == first

    ran = []
    monkeypatch.setattr(reproduce, "run_item", lambda *args: ran.append(args))
    reproduce.main(command)
    assert not ran and (tmp_path / "a" / "results.json").read_bytes() == first


def test_wrong_input_is_told_in_one_line(tmp_path, capsys):
    none = str(tmp_path / "none")
    for arguments, told in (
        (["--only", "table9"], "invalid choice: 'table9'"), (["--only", "memory", "--weights", none], none),
        (["--images", none], none), (["--only", "memory", "--networks", none], none),
        (["--only", "memory", "--networks", str(tmp_path)], "LPIPS (alexnet) needs"),  # a folder without the files
        (["--only", "sdedit", "--weights", none], "say which, --mfx-weights"),
    ):
        with pytest.raises(SystemExit) as end:
            reproduce.main(["--quick", "--out", str(tmp_path / "out"), *arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and lines[-1].startswith("python -m reproduce: error: ") and told in lines[-1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three pictures of each, two steps: what comes out means nothing, but nothing breaks on the way."""
    made = claims.Lab(options(inpainting_weights=reproduce.INPAINTING, out=tmp_path_factory.mktemp("lab")))
    (made.out / "cache").mkdir()
    made.count = lambda full, quick: 3
    made.steps = lambda toy: 2
    return made


@pytest.mark.parametrize("name", [i.name for i in claims.ITEMS.values() if i.shown and i.chapter == Item.chapter])
def test_every_item_of_differential_diffusion_runs_to_its_place_on_the_page(lab, name):
    item = claims.ITEMS[name]
    outcome, seconds = reproduce.run_item(item, lab, "digest")
    assert reproduce.kept(item, "digest", lab.out) == (outcome, seconds)
    verdict, why = item.verdict(outcome.results, outcome.timings)
    assert verdict in (TRUE, PART, FALSE, OPEN) and why
    table = item.table(outcome.results, outcome.timings)
    assert all(len(row) <= len(table[0]) for row in table)
    shown = outcome._replace(pictures=[(lab.out / file, caption) for file, caption in outcome.pictures])
    text = page.page([page.Entry(item, shown, verdict, why, seconds, "command")], {}, [])
    assert item.where in text and text.count("<img") == len(outcome.pictures)
