"""-m reproduce's parts: metrics and baselines on made-up data, verdicts, what is kept, the page."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import diffdiff
import diffusion
import samplers
from editing.few_steps import blend_overrides
from reproduce import __main__ as program
from reproduce import baselines, cache, metrics, papers, report, results
from reproduce.lab import DD, FALSE, OPEN, PART, TRUE, Outcome, judge
from tests.labs import make_item, make_lab

# --- Metrics --------------------------------------------------------------------------------------


def a_map(seed=0):
    return torch.rand(16, 16, generator=torch.Generator().manual_seed(seed))


def test_cam_of_a_perfect_edit_is_1_and_dam_0_whatever_the_scale():
    M = a_map()
    assert metrics.cam(M, -3 * M + 7) == pytest.approx(1, abs=1e-6)
    assert metrics.dam(M, -3 * M + 7) == pytest.approx(0, abs=1e-5)
    assert metrics.cam(M, 2 * M - 1) == pytest.approx(-1, abs=1e-6)  # the opposite of what was asked for ...
    assert metrics.dam(M, 2 * M - 1) == pytest.approx(0, abs=1e-5)  # ... which only CAM notices


def test_dam_is_the_least_squares_that_it_says_it_is():
    M, E = a_map(1), a_map(2)
    design = torch.stack([E.flatten().double(), torch.ones(256, dtype=torch.double)], 1)
    residual = M.flatten().double() - design @ torch.linalg.lstsq(design, M.flatten().double()[:, None]).solution[:, 0]
    assert metrics.dam(M, E) == pytest.approx(residual.norm().item(), rel=1e-9)
    closed = (M - M.mean()).double().norm().item() * (1 - metrics.cam(M, E) ** 2) ** 0.5
    assert metrics.dam(M, E) == pytest.approx(closed, rel=1e-6)
    assert metrics.dam(M, torch.ones(16, 16)) == pytest.approx((M - M.mean()).norm().item(), rel=1e-5)  # no change


def test_soft_edges_grow_with_blur_and_not_with_contrast():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 20:40, 16:48] = 1
    blurred = diffdiff.soft_inpainting_map(x.view(3, 64, 64), 3).view(1, 3, 64, 64)
    sharp, soft, faint = (metrics.soft_edges(y).item() for y in (x, blurred, 0.1 * x))
    assert sharp < 0.3 < 0.5 < soft <= 1
    assert faint == pytest.approx(sharp, abs=1e-6)
    there = torch.zeros(1, 1, 64, 64)
    there[..., :10] = 1  # nothing to see there
    assert metrics.soft_edges(x, there).item() == 1
    stripes = (torch.arange(64) // 16 % 2).float().expand(1, 3, 64, 64)  # sharp, and none at all from above to below
    assert metrics.soft_edges(stripes).item() < 0.3


def test_toy_distance_is_zero_for_the_same_and_lies_where_pictures_differ(tmp_path):
    lab = make_lab(tmp_path)
    x = lab.images(1)
    y = x.clone()
    y[..., 80:112, 80:112] *= -1
    with torch.inference_mode():
        assert metrics.toy_distance(lab.model.vae, x, x).abs().max() == 0
        d = metrics.toy_distance(lab.model.vae, x, y)
    assert d.shape == (1, 1, 128, 128)
    assert d[..., 80:112, 80:112].mean() > 5 * d[..., :64, :64].mean()


def test_the_shadow_share_of_made_pictures():
    truth, region = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)
    region[..., :4] = True
    coarse, output = torch.full_like(truth, 0.4), torch.full_like(truth, 0.2)
    output[..., 4:] = 1  # which is outside the region
    assert metrics.shadow_share(coarse, output, truth, region) == pytest.approx((0.16, 0.04, 0.75))
    assert metrics.shadow_share(coarse, output, truth, region, torch.abs) == pytest.approx((0.4, 0.2, 0.5))
    assert metrics.shadow_share(coarse, coarse, truth, region)[2] == 0
    assert metrics.shadow_share(coarse, output, truth, ~region)[2] == pytest.approx(1 - 1 / 0.16)  # worse than it was
    with pytest.raises(ValueError, match="empty"):
        metrics.shadow_share(coarse, output, truth, region & ~region)


def test_changed_shadows_are_what_changes_off_the_objects():
    before, after, objects = torch.full((1, 3, 9, 9), 0.5), torch.full((1, 3, 9, 9), 0.5), torch.zeros(1, 9, 9) > 0
    objects[0, 4, 4] = True
    after[0, :, 3:6, 3:8] = 0.2  # the object, its smoothed edge, and a shadow on its right
    after[0, 0, 0, 0] += 0.3  # one channel is enough
    after[0, :, 8, 8] += 0.01  # and this is too little
    region = metrics.changed_shadows(before, after, objects)
    assert region.nonzero()[:, 1:].tolist() == [[0, 0], *([y, x] for y in (3, 4, 5) for x in (6, 7))]
    assert metrics.changed_shadows(before, after, objects, least=0.005)[0, 8, 8]


def test_bootstrap_weights_sum_to_one_and_are_always_the_same():
    a = metrics.resample(9, draws=20)
    assert a.shape == (21, 9) and torch.equal(a, metrics.resample(9, draws=20))
    torch.testing.assert_close(a.sum(1), torch.ones(21))
    assert torch.equal(a[0], torch.full((9,), 1 / 9)) and a[1:].std() > 0
    assert metrics.drawn_error(torch.tensor([2.0, 1, 3, torch.nan])) == [2, 1.4142]


# --- Baselines ------------------------------------------------------------------------------------


def denoise(z, t):
    return torch.tanh(z + 0.3 * z.roll(1, -1)) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


def test_the_baselines_in_latents():
    z_init, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sampler, mu = samplers.make_sampler("ddim", diffusion.Schedule(), 10), torch.ones(8, 8)
    mu[:, :4] = 0.25
    seen = []
    baselines.masked_noise(lambda z, t: seen.append(z) or denoise(z, t), z_init, mu, sampler, noise)
    torch.testing.assert_close(seen[0], sampler.noise_to(0, z_init, noise * (1 - mu)))  # none where the map is white


def test_one_strength_at_a_time_edits_each_level_once():
    maps = []

    def edit(image, mu):
        maps.append(mu)
        return image + 1

    image, mu = torch.zeros(1, 3, 4, 10), torch.linspace(0, 1, 10).expand(4, 10)
    tiled = baselines.edit_level_by_level(edit, image, mu, 5, keep_outside=True)
    assert torch.equal(tiled, torch.ones(1, 3, 4, 10))  # each pixel came through once
    assert [round(m.min().item(), 3) for m in maps] == [0.056, 0.278, 0.5, 0.722, 0.944]  # from the strongest on
    composed = baselines.edit_level_by_level(edit, image, mu, 5, keep_outside=False)
    assert torch.equal(composed, torch.full((1, 3, 4, 10), 5.0))


@pytest.mark.parametrize("how", [baselines.dither, blend_overrides, baselines.own_schedules])
def test_more_strengths_than_steps(how):
    """At whole steps the paper's own rule; between two of them, results between theirs. White is the original."""
    sampler = samplers.make_sampler("ddim", diffusion.Schedule(spacing="trailing"), 4)
    z_init, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def change(mu, rule):
        return (rule(denoise, z_init, mu, sampler, noise) - z_init).abs().mean().item()

    mu = torch.arange(64).view(8, 8) % 5 / 4
    z = how(denoise, z_init, mu, sampler, noise)
    torch.testing.assert_close(z, diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise))
    assert torch.equal(z[..., mu == 1], z_init[..., mu == 1])
    sampler = samplers.make_sampler("ddim", diffusion.Schedule(spacing="trailing"), 10)
    mu = torch.arange(64).view(8, 8) % 11 / 10  # binary fractions hit no tenth
    z = how(denoise, z_init, mu, sampler, noise)
    torch.testing.assert_close(z, diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise))
    sampler = samplers.make_sampler("ddim", diffusion.Schedule(spacing="trailing"), 4)
    changes = [change(torch.full((8, 8), j / 16), how) for j in range(17)]
    assert all(a > b for a, b in zip(changes, changes[1:])) and changes[-1] == 0


@pytest.mark.parametrize("paste", [baselines.paste_alpha, baselines.paste_poisson, baselines.paste_laplace])
def test_pasting_keeps_the_original_outside_and_what_is_the_same_everywhere(paste):
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


# --- Verdicts, and kept results -------------------------------------------------------------------


def test_verdicts_join_the_parts_of_a_claim():
    yes, no = (True, "it is"), (False, "it is not")
    assert judge(yes, yes)[0] == TRUE and judge(no)[0] == FALSE and judge(yes, no)[0] == PART
    assert judge(yes, no)[1] == "It is. But: it is not."


def test_a_key_changes_with_options_and_weights_that_the_item_needs_and_a_digest_with_code(tmp_path, monkeypatch):
    options = {"quick": True, "weights": "a"}
    first = cache.key_of(make_item(), options)
    assert first == cache.key_of(make_item(), {"weights": "a", "quick": True})
    assert first != cache.key_of(make_item(), {"quick": False, "weights": "a"})
    assert first != cache.key_of(make_item(), {"quick": True, "weights": "b"})
    assert first == cache.key_of(make_item(), options | {"mfx_weights": "c"})  # which it does not need
    assert first != cache.key_of(make_item(needs=("mfx_weights",)), options | {"mfx_weights": "c"})
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    digests = set()
    for file in ("diffdiff.py", "toy/__init__.py", "toy/world.py", "tests/__init__.py", "tests/test_a.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1")
        digests.add(cache.digest_code.__wrapped__())
    assert len(digests) == 3  # a test changes no result


def test_fingerprints_notice_any_of_the_weights_and_an_autoencoder_elsewhere(tmp_path):
    model, vae = tmp_path / "alone" / "model", tmp_path / "vae"
    seen = [cache.fingerprint(None), cache.fingerprint(tmp_path / "alone")]
    assert seen == ["none", "none"]
    for folder in (model / "synthesizer", vae):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1")
    (model / "mfx.json").write_text('{"vae": "../../vae"}')
    for changed in (None, vae / "weights", model / "synthesizer" / "weights"):
        if changed:
            os.utime(changed, ns=(0, len(seen)))  # written again, as long as before
        seen.append(cache.fingerprint(tmp_path / "alone"))
    assert len(set(seen)) == 4


def test_a_finished_item_is_read_back_and_one_that_lost_its_picture_is_not(tmp_path, monkeypatch):
    lab = make_lab(tmp_path)

    def draw(lab):
        lab.save(Image.new("RGB", (8, 8)), "probe.png")
        return Outcome({"value": 0.5}, judge((True, "so")), [["a"]], [("probe.png", "a picture")], {"seconds": 2.0})

    item = make_item(draw)
    entry = program.run_item(item, lab, "key")
    outcome = entry.outcome
    assert outcome.results == {"value": 0.5} and outcome.verdict == [TRUE, "So."]
    assert cache.read(item, "key", tmp_path, quick=True) == entry and entry.current
    with monkeypatch.context() as patch:
        patch.setattr(cache, "digest_code", lambda: "another")
        assert not cache.read(item, "key", tmp_path).current
    assert cache.read(item, "another", tmp_path) is None
    (tmp_path / "probe.png").unlink()
    assert cache.read(item, "key", tmp_path) is None
    (tmp_path / "cache" / "probe.json").write_text("{")
    assert cache.read(item, "key", tmp_path) is None


# --- The pages ------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    entries = [report.Entry(make_item(), outcome, 3.2, tmp_path) for outcome in (
        *(Outcome({"value": "<b>&</b>"}, (verdict, "<script>why</script>"), [["<i>"]], [("a.png", 'a "caption" <i>')])
          for verdict in (TRUE, PART, FALSE)), Outcome({}, (OPEN, "not here")))]
    text = report.write_page(entries, {"weights": "<toy>"}, ["figure9"])
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "http" not in text.replace("http-equiv", "")
    assert "<script" not in text and "<b>" not in text and "&lt;b&gt;&amp;" in text and "&lt;toy&gt;" in text
    assert "@media print" in text and "figure9" in text and "A claim.<" in text
    for tag in ("section", "table", "figure", "dl", "div", "span", "main"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_the_page_of_results_says_which_samples_and_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "EXAMPLES", tmp_path)
    outcome = Outcome({"n": 6, "value": 2}, (PART, "A|b."), [["head", "x"], ["0.5 ± 0.1"]])
    other = replace(make_item(chapter="Magic Fixup"), name="other")
    found = {"probe": report.Entry(make_item(), outcome, 1.0, tmp_path, quick=True),
             "other": report.Entry(other, outcome, 1.0, tmp_path)}
    page, names = tmp_path / "page.md", ["probe", "figure9", "other"]
    results.write_results(found, names, page, {"weights": "toy"})
    text = page.read_text(encoding="utf-8")
    assert text.startswith(results.PREFACE + results.write_status()) and "Not run here: `figure9`" in text
    first, second = re.findall(r"Done 2 times\.\n\n\*\*Came true in part, n = 6(.*?):\*\* A\|b\.", text)
    assert (first, second) == (", few", "")
    assert "| 0.5 ± 0.1 |  |" in text and "`python -m reproduce --only probe --quick`" in text

    # What is not run again, or cannot be, stays as it was measured.
    absent = report.Entry(other, Outcome({}, (OPEN, "no weights")), 0, tmp_path)
    for again in ({"other": absent}, {}):
        results.write_results(again, names, page, {"weights": "toy"})
        after = page.read_text(encoding="utf-8")
        assert after.partition("## Magic Fixup: verdicts")[2] == text.partition("## Magic Fixup: verdicts")[2]
        assert "as they stood here before: `probe`, `other`." in after and "--only probe --quick`" in after

    # Nothing else is written over.
    page.write_text("my own notes")
    with pytest.raises(ValueError, match="no page of results"):
        results.write_results(found, names, page, {"weights": "toy"})
    assert page.read_text() == "my own notes"


def test_every_table_and_figure_has_a_row_and_its_item_names_it():
    for paper, rows in papers.ROWS.items():
        tables, figures = (4, 27) if paper == DD else (1, 12)
        numbers = [int(row.where.split()[1]) for row in rows if re.match(r"(Table|Figure) \d+$", row.where)]
        assert numbers == [*range(1, tables + 1)] * (paper == DD) + [*range(1, figures + 1)]
        for row in rows:
            assert (row.state == papers.ABSENT) == (not row.item)
            item = program.ITEMS.get(row.item)
            if item:
                assert item.chapter == paper and row.where.split()[-1] in re.findall(r"[\d.]+", item.where), row


def test_a_cheap_item_from_command_to_page_twice_the_same_and_not_run_again(tmp_path, capsys, monkeypatch):
    command = ["--quick", "--only", "figure26", "--out", str(tmp_path / "a")]
    program.main(command)
    assert "Figure 26: came true" in capsys.readouterr().out
    first = (tmp_path / "a" / "results.json").read_bytes()
    assert set(json.loads(first)["items"]) == {"figure26"}
    assert "figure26" in json.loads((tmp_path / "a" / "timings.json").read_text())
    assert "data:image/" in (tmp_path / "a" / "index.html").read_text(encoding="utf-8")

    page = tmp_path / "results.md"
    program.main(["--out", str(tmp_path / "a"), "--results", str(page)])
    assert "`python -m reproduce --only figure26 --quick`" in page.read_text(encoding="utf-8")

    program.main([*command[:-1], str(tmp_path / "b")])
    assert (tmp_path / "b" / "results.json").read_bytes() == first

    ran = []
    monkeypatch.setattr(program, "run_item", lambda *args: ran.append(args))
    program.main(command)
    assert not ran and (tmp_path / "a" / "results.json").read_bytes() == first
