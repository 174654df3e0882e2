"""Magic Fixup's items of -m reproduce: the verdicts on invented results, the measures on made-up pictures, a run."""

import json
from types import SimpleNamespace

import pytest
import torch

from reproduce import __main__ as reproduce
from reproduce import lab as claims
from reproduce import mfx_ablation as ablation_mfx
from reproduce import mfx_figures as figures_mfx
from reproduce import mfx_tables as claims_mfx
from reproduce.lab import FALSE, OPEN, PART, TRUE
from reproduce.mfx_tables import AFFINE, ALONE, FLOW, FULL, TRAINED
from toy import world as toyworld
from toy.edits import VERBS


@pytest.fixture
def lab(tmp_path):
    return claims.Lab(SimpleNamespace(
        weights=reproduce.sample.TOY, mfx_weights=reproduce.sample.TOY_MFX, inpainting_weights=None, images=None,
        ablation_weights=reproduce.ABLATION, networks=None, prompt="", quick=True, out=tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The table of ablations


def table_of(error=0.001, missing=(), **distances):
    """Results of `ablation`, as if every model had exactly these distances on (affine, flow)."""
    names = {"alone": ALONE, "full": FULL, "flow": FLOW, "affine": AFFINE}
    found = {names[k]: dict(zip(ablation_mfx.TESTS, v)) for k, v in distances.items()}
    tests = {test: {a: {"distance": [x[test], error], "squared": [1.0, error],
                        "others less this": {b: [round(y[test] - x[test], 4), error] for b, y in found.items()}}
                    for a, x in found.items()} for test in ablation_mfx.TESTS}
    return {"n": 8, "missing": list(missing), "distance": "toy", "tests": tests}


PAPER = dict(affine=(0.231, 0.220), flow=(0.229, 0.190), full=(0.231, 0.196), alone=(0.327, 0.269))


@pytest.mark.parametrize("results, wanted, said", [
    (table_of(**PAPER), TRUE, "surely better than on piecewise affine (-0.0300 ± 0.0010)"),
    (table_of(0.007, **PAPER), TRUE, "better than on piecewise affine (-0.0300 ± 0.0070)"),  # its own errors
    (table_of(**PAPER | {"flow": (0.229, 0.21)}), PART, "not surely better than on both (full method) (+0.0140"),
    (table_of(0.02, **PAPER | {"alone": (0.25, 0.23)}), FALSE, "not surely worse"),
    (table_of(full=PAPER["full"], alone=PAPER["alone"], missing=[FLOW]), OPEN, "train.py --motion flow --out"),
])
def test_the_order_of_the_table_is_judged_by_the_errors_of_differences(results, wanted, said):
    verdict, why = ablation_mfx.ablation_verdict(results)
    assert verdict == wanted and said in why
    assert [row[0] for row in ablation_mfx.ablation_table(results)][1:] == ["(the coarse edit itself)", *(
        ablation_mfx.CALLED.values())]


def test_both_tests_are_of_the_same_scenes_and_other_warps():
    affine, flow = (ablation_mfx.held_out(9, test, 32) for test in ("affine", "flow"))
    assert len(flow["truth"]) == 9 and flow["truth"].min() >= 0 and flow["truth"].max() <= 1
    assert torch.equal(affine["truth"], flow["truth"]) and torch.equal(affine["reference"], flow["reference"])
    assert not torch.equal(affine["coarse"], flow["coarse"])


def test_the_table_from_models_to_verdict(lab, monkeypatch):
    monkeypatch.setattr(ablation_mfx, "STEPS", 2)
    monkeypatch.setattr(lab, "count", lambda full, quick: 2)
    with torch.inference_mode():
        outcome = claims.ITEMS["ablation"].run(lab)
    results = json.loads(json.dumps(outcome.results))
    assert results["n"] == 2 and {FULL, ALONE, "coarse edit"} <= set(results["tests"]["flow"])
    flow = results["tests"]["flow"]
    assert flow[FULL]["others less this"][ALONE][0] == -flow[ALONE]["others less this"][FULL][0]
    for other in (ALONE, "coarse edit"):
        difference = flow[FULL]["distance"][0] - flow[other]["distance"][0]
        assert flow[other]["others less this"][FULL][0] == pytest.approx(difference, abs=2e-4)
    assert flow[FULL]["distance"] != flow["coarse edit"]["distance"] and flow[FULL]["squared"] != flow[ALONE]["squared"]
    assert (ablation_mfx.ablation_verdict(results)[0] == OPEN) == bool(results["missing"])
    claims.ITEMS["ablation"].done.format_map(results)


# ---------------------------------------------------------------------------------------------------------------------
# The four models: where they are, how they are trained


def a_model(path):
    (path / "scheduler").mkdir(parents=True)
    (path / "synthesizer").mkdir()
    (path / "synthesizer" / "weights").write_bytes(b"1")
    return path


def test_a_model_is_found_as_shipped_and_as_trained_and_only_if_it_is_whole(tmp_path):
    assert claims_mfx.place_of(tmp_path, FLOW) is None
    assert claims_mfx.place_of(tmp_path, FULL) is None
    (tmp_path / FULL / "model" / "synthesizer").mkdir(parents=True)  # without a scheduler: not written to its end
    assert claims_mfx.place_of(tmp_path, FULL) is None
    a_model(tmp_path / FLOW)
    assert claims_mfx.place_of(tmp_path, FLOW) == tmp_path / FLOW
    a_model(tmp_path / AFFINE / "model")
    assert claims_mfx.place_of(tmp_path, AFFINE) == tmp_path / AFFINE / "model"


def test_one_command_trains_what_is_not_there_yet(tmp_path, monkeypatch, capsys):
    a_model(tmp_path / FLOW / "model")
    (tmp_path / ALONE).mkdir()
    (tmp_path / ALONE / "mfx-state-0000500.safetensors").touch()
    ran = []
    monkeypatch.setattr(ablation_mfx.train, "main", ran.append)
    ablation_mfx.main(["--out", str(tmp_path), "--steps", "7"])
    others = [str(tmp_path / name) for name in TRAINED if name != FLOW]
    assert [run[:2] for run in ran] == [["--out", out] for out in others]
    affine, alone, full = (run[2:] for run in ran)
    steps = [*ablation_mfx.TRAINING, "--steps", "7"]  # of which train.py takes the last
    assert affine == ["--motion", "affine", *steps] and full == steps
    assert alone == ["--no-cross-reference", *ablation_mfx.TRAINING, "--resume", "--steps", "7"]
    assert f"--ablation-weights {tmp_path}" in capsys.readouterr().out


def test_kept_results_notice_any_of_the_weights(tmp_path):
    """Another model, and another autoencoder that a model leans on elsewhere."""
    model, vae = a_model(tmp_path / ALONE), tmp_path / "vae"
    vae.mkdir()
    (vae / "weights").write_bytes(b"1")
    (model / "mfx.json").write_text('{"vae": "../vae"}')
    seen = {reproduce.fixup_fingerprint(None), reproduce.fixup_fingerprint(model)}
    (vae / "weights").write_bytes(b"2")
    seen.add(reproduce.fixup_fingerprint(model))
    (model / "synthesizer" / "weights").write_bytes(b"2")
    seen.add(reproduce.fixup_fingerprint(model))
    assert len(seen) == 4
    item, options = claims.ITEMS["cross_reference"], {"quick": True, "mfx_weights": "a"}
    first = reproduce.digest_of(item, options | {"ablation_weights": {ALONE: "a"}})
    assert first != reproduce.digest_of(item, options | {"ablation_weights": {ALONE: "b"}})
    assert first == reproduce.digest_of(item, options | {"ablation_weights": {ALONE: "a"}, "mfx_weights": "b"})


def test_the_source_of_an_item_holds_what_a_cache_wraps():
    code = reproduce.source(claims.ITEMS["cross_reference"].run)
    called = {f"reproduce.mfx_tables.{name}" for name in ("fixed_eight", "fix_up", "edits_of")}
    assert called | {"mfx", "collage"} <= set(code)


def test_without_models_a_run_goes_on_and_says_how_they_are_trained(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    names = ["ablation", "mfx_figure4", "mfx_figure9", "cross_reference"]
    command = ["--quick", "--only", *names, "--out", str(tmp_path / "o"), "--ablation-weights"]
    reproduce.main([*command, str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert out.count(f": {OPEN}. Not there") == 4 and out.count("--no-cross-reference --out") == 3
    items = json.loads((tmp_path / "o" / "results.json").read_text())["items"]
    assert {name: items[name]["verdict"] for name in names} == dict.fromkeys(names, OPEN)
    with pytest.raises(SystemExit):
        reproduce.main([*command, str(tmp_path / "nowhere")])
    assert "nowhere: there is no such" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Edits, and how wrong they are


def test_edits_know_their_truth():
    edits = claims_mfx.user_edits(16, size=64)
    assert set(edits["verb"]) == set(VERBS)
    for verb, there in zip(edits["verb"], edits["object"]):
        assert there.any() == (verb != "delete")
    wrong = (edits["coarse"] - edits["truth"]).abs().amax(1) > 0.02
    assert wrong[edits["changed"]].float().mean() > 0.7  # the collage leaves them as they were
    assert not (edits["changed"] & edits["object"]).any()
    some = claims_mfx.some(edits, 3, 2)
    assert torch.equal(some["truth"], edits["truth"][3:5]) and some["verb"] == edits["verb"][3:5]
    assert len(some["after"]) == 2


def test_errors_are_compared_picture_by_picture():
    g = torch.Generator().manual_seed(0)
    target, noise = torch.rand(12, 3, 8, 8, generator=g), torch.randn(12, 3, 8, 8, generator=g)
    other, everywhere = torch.randn(12, 3, 8, 8, generator=g), torch.ones(12, 8, 8, dtype=torch.bool)
    shown = {"base": target + noise, "twice": target + 2 * noise, "other": target + 2 * other}
    found = claims_mfx.compared(shown, target, {"everywhere": everywhere}, "base")["everywhere"]
    assert found["error"]["base"] == pytest.approx(noise.square().mean().item(), abs=1e-6)
    assert found["ratio"]["base"] == [1, 0] and found["ratio"]["twice"] == [4, 0]  # however different the pictures are
    assert found["ratio"]["other"][0] == pytest.approx(4, rel=0.2) and found["ratio"]["other"][1] > 0.01


def test_captions_name_everything_and_an_empty_scene_its_place():
    scenes = toyworld.random_scenes(40, torch.Generator().manual_seed(1))
    told = [claims_mfx.caption(scenes, i) for i in range(40)]
    count = (scenes.kind >= 0).sum(1)
    for i, text in enumerate(told):
        assert text.count("a ") == count[i] and toyworld.TIMES[scenes.time[i]] in text
        assert (" and " in text) == (count[i] > 1) and text.count(",") == max(0, count[i] - 2)
    scenes.kind[:] = -1
    assert claims_mfx.caption(scenes, 0).split(" at ")[0] in toyworld.GROUNDS


def ratios(value, error=0.01, **others):
    regions = ("shadows and reflections", "holes", "the edited objects", "everywhere")
    return {where: {"error": {"collage": 0.1, "with": 0.2, "without": 0.2 * value} | others.get("errors", {}),
                    "ratio": {who: [value, error] for who in others.get("who", ("without",))}} for where in regions}


def test_the_extractor_s_worth_is_judged_by_ratios():
    moved = {"shadows and reflections": {"error": {"with": 0.3, "without": 0.2, "truth": 0.4},
                                         "ratio": {"without": [0.67, 0.01]}}}
    results = {"missing": [], "error": ratios(1.5), "distance from the coarse edit": moved}
    assert claims_mfx.cross_reference_verdict(results)[0] == TRUE
    verdict, why = claims_mfx.cross_reference_verdict(results | {"error": ratios(1.01)})
    assert verdict == PART and "Why" in why  # the collage is nearer than either
    moved["shadows and reflections"]["ratio"]["without"] = [1.2, 0.01]
    assert claims_mfx.cross_reference_verdict(results | {"error": ratios(1.01)})[0] == FALSE


def test_votes_go_to_what_is_nearest():
    apart = {claims_mfx.FIXED: torch.tensor([1.0, 1, 1, 3]), claims_mfx.SILENT: torch.tensor([2.0, 2, 2, 2]),
             claims_mfx.CAPTIONED: torch.tensor([3.0, 3, 0, 4])}
    share, error = claims_mfx.votes(apart)
    assert share == 0.5 and 0.1 < error < 0.3
    apart[claims_mfx.FIXED] *= 0
    apart[claims_mfx.CAPTIONED] += 1
    assert claims_mfx.votes(apart)[0] == 1 and claims_mfx.votes(apart)[1] > 0


@pytest.mark.parametrize("flow, affine, wanted", [(0.5, 2.0, TRUE), (1.0, 2.0, PART), (1.0, 1.0, PART)])
def test_what_motion_models_teach_is_judged_by_ratios(flow, affine, wanted):
    error = ratios(affine, who=("affine only",))
    moved = {"shadows and reflections": {"ratio": {"flow only": [flow, 0.01]}}}
    verdict, why = figures_mfx.figure9_verdict({"missing": [], "error": error, "distance from the coarse edit": moved})
    assert verdict == wanted and "neither is surely better" in why
    if affine == 1:
        for where in error.values():
            where["ratio"]["flow only"] = [0.8, 0.01]
        assert "flow only is, holes" in figures_mfx.figure9_verdict(
            {"missing": [], "error": error, "distance from the coarse edit": moved})[1]


def test_blacks_are_judged_by_how_much_and_how_surely():
    def off(with_, without):
        row = dict.fromkeys(figures_mfx.OFF, with_), dict.fromkeys(figures_mfx.OFF, without)
        return dict(zip((figures_mfx.WITH, figures_mfx.WITHOUT), row)) | {
            "surely less": dict.fromkeys(figures_mfx.OFF, with_[0] < without[0] - 0.01)}

    much, nothing = off([0.01, 0.001], [0.3, 0.001]), off([0.01, 0.001], [0.011, 0.001])
    a_little = off([0.2, 0.001], [0.3, 0.001])  # surely, but not drastically
    for used, hidden, wanted in ((much, much, TRUE), (nothing, much, PART), (a_little, a_little, FALSE)):
        verdict, why = figures_mfx.figure4_verdict(
            {"missing": [], "off": {figures_mfx.USED: used, figures_mfx.HIDDEN: hidden}})
        assert verdict == wanted and ("Why" in why) == (wanted == PART)


def test_darkness_measures_what_it_says():
    truth = torch.linspace(0, 1, 400).view(1, 1, 20, 20).expand(1, 3, 20, 20)
    lifted = figures_mfx.darkness(truth.clamp(min=0.2), truth)
    assert lifted["blacks"].item() == pytest.approx(0.15, abs=0.01) and lifted["brightness"].item() < 0.03
    brighter = figures_mfx.darkness(truth + 0.1, truth)
    assert [round(v.item(), 3) for v in brighter.values()] == [0.1, 0.1, 10.0]


def test_motion_models_from_pairs_to_page(lab, monkeypatch):
    monkeypatch.setattr(lab, "count", lambda full, quick: 3)
    with torch.inference_mode():
        outcome = claims.ITEMS["mfx_figure5"].run(lab)
    results = json.loads(json.dumps(outcome.results))
    warps = results["warps"]
    assert warps["reference"]["holes"] == "0.0 %" and warps["reference"]["squared"] > warps["flow"]["squared"]
    assert (lab.out / "mfx_figure5.png").stat().st_size > 10_000
    verdict, why = claims.ITEMS["mfx_figure5"].verdict(results, {})
    assert verdict in (TRUE, PART, FALSE) and "squared error" in why
    assert len(claims.ITEMS["mfx_figure5"].table(results, {})) == 4
