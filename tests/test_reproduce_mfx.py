"""Magic Fixup's items of -m reproduce: the verdicts on invented results, the measures on made-up pictures."""

import pytest
import torch

from reproduce import mfx_figures, mfx_tables
from reproduce.lab import FALSE, PART, TRUE
from reproduce.mfx_tables import AFFINE, ALONE, EVERYWHERE, FLOW, FULL, HOLES, OBJECTS, SHADOWS, TESTS
from toy.edits import VERBS

# --- The table of ablations -----------------------------------------------------------------------

PAPER = {AFFINE: (0.231, 0.220), FLOW: (0.229, 0.190), FULL: (0.231, 0.196), ALONE: (0.327, 0.269)}


@pytest.mark.parametrize("changed, error, wanted, said", [
    ({}, 0.001, TRUE, "surely better than on piecewise affine (-0.0300 ± 0.0010)"),
    ({}, 0.007, TRUE, "better than on piecewise affine (-0.0300 ± 0.0070)"),  # its own errors
    ({FLOW: (0.229, 0.21)}, 0.001, PART, "not surely better than on both (full method) (+0.0140"),
    ({ALONE: (0.25, 0.23)}, 0.02, FALSE, "not surely worse"),
])
def test_the_order_of_the_table_is_judged_by_the_errors_of_differences(changed, error, wanted, said):
    """As if every model had exactly these distances on (affine, flow)."""
    found = PAPER | changed | {"coarse edit": (0.3, 0.3)}
    tests = {test: {a: {"distance": [x[i], error], "squared": [1.0, error],
                        "others less this": {b: [round(found[b][i] - x[i], 4), error] for b in PAPER}}
                    for a, x in found.items()} for i, test in enumerate(TESTS)}
    verdict, why = mfx_tables.ablation_verdict(tests)
    assert verdict == wanted and said in why
    rows = [row[0] for row in mfx_tables.ablation_table(tests, "toy")]
    assert rows[1:] == ["(the coarse edit itself)", *mfx_tables.CALLED.values()]


def test_both_tests_are_of_the_same_scenes_and_other_warps():
    affine, flow = mfx_tables.make_held_out_pairs(9, 32).values()
    assert 4 <= len(flow["truth"]) <= 9 and flow["truth"].min() >= 0 and flow["truth"].max() <= 1
    assert torch.equal(affine["truth"], flow["truth"]) and torch.equal(affine["reference"], flow["reference"])
    assert not torch.equal(affine["coarse"], flow["coarse"])


# --- Edits, and how wrong they are ----------------------------------------------------------------


def test_edits_know_their_truth():
    edits = mfx_tables.make_user_edits(16, size=64)
    assert set(edits["verb"]) == set(VERBS)
    for verb, there in zip(edits["verb"], edits["object"]):
        assert there.any() == (verb != "delete")
    wrong = (edits["coarse"] - edits["truth"]).abs().amax(1) > 0.02
    assert wrong[edits["changed"]].float().mean() > 0.7  # the collage leaves them as they were
    assert not (edits["changed"] & edits["object"]).any()
    some = mfx_tables.take(edits, 3, 2)
    assert torch.equal(some["truth"], edits["truth"][3:5]) and some["verb"] == edits["verb"][3:5]
    assert len(some["after"]) == 2


def test_errors_are_compared_picture_by_picture():
    g = torch.Generator().manual_seed(0)
    target, noise = torch.rand(12, 3, 8, 8, generator=g), torch.randn(12, 3, 8, 8, generator=g)
    other, everywhere = torch.randn(12, 3, 8, 8, generator=g), torch.ones(12, 8, 8, dtype=torch.bool)
    shown = {"base": target + noise, "twice": target + 2 * noise, "other": target + 2 * other}
    found = mfx_tables.compare(shown, target, {"everywhere": everywhere}, "base")["everywhere"]
    assert found["error"]["base"] == pytest.approx(noise.square().mean().item(), abs=1e-6)
    assert found["ratio"]["base"] == [1, 0] and found["ratio"]["twice"] == [4, 0]  # however different the pictures are
    assert found["ratio"]["other"][0] == pytest.approx(4, rel=0.2) and found["ratio"]["other"][1] > 0.01


def test_darkness_measures_what_it_says():
    truth = torch.linspace(0, 1, 400).view(1, 1, 20, 20).expand(1, 3, 20, 20)
    lifted = mfx_figures.measure_darkness(truth.clamp(min=0.2), truth)
    assert lifted["blacks"].item() == pytest.approx(0.15, abs=0.01) and lifted["brightness"].item() < 0.03
    brighter = mfx_figures.measure_darkness(truth + 0.1, truth)
    assert [round(v.item(), 3) for v in brighter.values()] == [0.1, 0.1, 10.0]


# --- Verdicts -------------------------------------------------------------------------------------


def ratios(value, who):
    return {where: {"error": {"collage": 0.1, "with": 0.2, "without": 0.2 * value}, "ratio": {who: [value, 0.01]}}
            for where in (SHADOWS, HOLES, OBJECTS, EVERYWHERE)}


def test_the_extractor_s_worth_is_judged_by_ratios():
    moved = {"error": {"with": 0.3, "without": 0.2, "truth": 0.4}, "ratio": {"without": [0.67, 0.01]}}
    assert mfx_tables.cross_reference_verdict(ratios(1.5, "without"), moved)[0] == TRUE
    assert mfx_tables.cross_reference_verdict(ratios(1.01, "without"), moved)[0] == PART
    moved["ratio"]["without"] = [1.2, 0.01]
    assert mfx_tables.cross_reference_verdict(ratios(1.01, "without"), moved)[0] == FALSE


@pytest.mark.parametrize("flow, affine, wanted", [(0.5, 2.0, TRUE), (1.0, 2.0, PART), (1.0, 1.0, PART)])
def test_what_motion_models_teach_is_judged_by_ratios(flow, affine, wanted):
    error = ratios(affine, "affine only")
    verdict, why = mfx_figures.figure9_verdict(error, [flow, 0.01])
    assert verdict == wanted and "neither is surely better" in why
    if affine == 1:
        for where in error.values():
            where["ratio"]["flow only"] = [0.8, 0.01]
        assert "flow only is, holes" in mfx_figures.figure9_verdict(error, [flow, 0.01])[1]


def test_blacks_are_judged_by_how_much_and_how_surely():
    def off(used, other):
        return {mfx_figures.WITH: dict.fromkeys(mfx_figures.OFF, [used, 0.001]),
                mfx_figures.WITHOUT: dict.fromkeys(mfx_figures.OFF, [other, 0.001]),
                "surely less": dict.fromkeys(mfx_figures.OFF, used < other - 0.01)}

    much, nothing, a_little = off(0.01, 0.3), off(0.01, 0.011), off(0.2, 0.3)  # the last surely, but not drastically
    for used, hidden, wanted in ((much, much, TRUE), (nothing, much, PART), (a_little, a_little, FALSE)):
        assert mfx_figures.figure4_verdict({mfx_figures.USED: used, mfx_figures.HIDDEN: hidden})[0] == wanted
