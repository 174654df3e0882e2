"""Magic Fixup's table of ablations, and the four models that it compares. All four, one after another, by train.py:

    python -m reproduce.mfx_ablation                     into runs/ablation/, from weights/toy; goes on where it stopped
    python -m reproduce.mfx_ablation --steps 200 --pairs 500   what train.py understands is passed on to it
    python -m reproduce --ablation-weights runs/ablation    measures with them instead of the shipped ones

The models differ in the motion model that made the coarse edits of their training pairs, 'flow', 'affine' or either;
and one has no detail extractor. They see as many steps of as many pairs.
"""

import argparse
from pathlib import Path

import torch

import train
from common.cli import Parser
from common.run_state import list_states
from reproduce.lab import HELD_OUT, Outcome, item, mean_error, plus_minus
from reproduce.mfx_tables import (
    AFFINE,
    ALONE,
    CHAPTER,
    FLOW,
    FULL,
    TRAINED,
    fix_up,
    models,
    place_of,
    some,
    with_missing,
)
from toy.pairs import toy_pairs

TESTS = ("affine", "flow")
STEPS = 25  # half of the paper's for a toy, to which they make no difference here: the item measures it
TRAINING = ("--steps", "1500")  # less than a third of weights/toy-mfx's, so that four models are soon done
CALLED = {AFFINE: "piecewise affine", FLOW: "flow", ALONE: "both, no cross-reference", FULL: "both (full method)"}
PAPER = {  # LPIPS, each with a standard error of 0.007 (0.008 for the one without cross-reference attention on flow)
    AFFINE: {"affine": 0.231, "flow": 0.220}, FLOW: {"affine": 0.229, "flow": 0.190},
    ALONE: {"affine": 0.327, "flow": 0.269}, FULL: {"affine": 0.231, "flow": 0.196},
}

# ---------------------------------------------------------------------------------------------------------------------
# The table


def held_out(n, test, size):
    """n pairs as in training, of scenes that no model has seen -> dict as of claims_mfx.edits_of, in [0, 1].

    The scenes, and what moves in them, are the same for both tests: only the coarse edits are made differently.
    """
    parts = [toy_pairs(min(8, n - i), torch.Generator().manual_seed(HELD_OUT + 2000 + i), test, size)
             for i in range(0, n, 8)]
    whole = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    return {"reference": whole["reference"] / 2 + 0.5, "coarse": whole["coarse"] / 2 + 0.5,
            "truth": whole["target"] / 2 + 0.5, "mask": whole["mask"]}


@item(
    "ablation", "Table in section 4.2", chapter=CHAPTER, cost=220, needs=("weights", "ablation_weights"),
    claim="Without cross-reference attention the result is the worst on both tests, and training on flow is the best "
          "where the test is on flow.",
    done="{n} held-out pairs of frames, the same for both tests, warped by flow or piecewise affinely (the two coarse "
         "edits differ in {differ} of the pixels), through four models of the same training, {steps} steps of DDIM. "
         "{distance} between output and target, and squared error in thousandths, with standard errors; the verdict "
         "takes those of the differences, pair by pair. Twice the steps change the full method's distance by "
         "{twice the steps} on {checked} of the pairs.",
    table=lambda r, t: ablation_table(r), verdict=lambda r, t: ablation_verdict(r),
)
def ablation(lab):
    found, missing = models(lab, TRAINED)
    if not found:
        return Outcome({"n": 0, "missing": missing, "differ": "", "steps": 0, "distance": lab.perceptual[0],
                        "twice the steps": "", "checked": 0, "tests": {}})
    first = next(iter(found.values()))
    n, steps, size = lab.count(104, 8), STEPS if first.size == 128 else 50, first.size
    edits = {test: held_out(n, test, size) for test in TESTS}
    differ = (edits["flow"]["coarse"] - edits["affine"]["coarse"]).abs().amax(1) > 0.02

    def scores(x, truth):  # (k, 3, S, S) -> perceptual distance and squared error of each, (k, 2)
        distance = lab.distance(x * 2 - 1, truth * 2 - 1).mean((1, 2))
        return torch.stack([distance, 1000 * (x - truth).square().mean((1, 2, 3))], 1)

    def scored(model, edits, steps):  # batch by batch, each with noise of its own, the same for all models -> (n, 2)
        batches = [(i, some(edits, i, 8)) for i in range(0, len(edits["truth"]), 8)]
        return torch.cat([scores(fix_up(model, e, steps, seeds=[i]), e["truth"]) for i, e in batches])

    jobs = [(test, name) for test in TESTS for name in found]
    each = {job: scored(found[job[1]], edits[job[0]], steps) for job in lab.each(jobs)}
    each |= {(test, "coarse edit"): scores(edits[test]["coarse"], edits[test]["truth"]) for test in TESTS}
    tests = {test: {who: {"distance": mean_error(x[:, 0]), "squared": mean_error(x[:, 1]),
                          "others less this": {other: mean_error(each[test, other][:, 0] - x[:, 0]) for other in found}}
                    for (where, who), x in each.items() if where == test} for test in TESTS}
    name, k = FULL if FULL in found else next(iter(found)), lab.count(24, 8)
    more = scored(found[name], some(edits["flow"], 0, k), 2 * steps) - each["flow", name][:k]
    return Outcome({"n": n, "missing": missing, "differ": f"{100 * differ.float().mean():.1f} %", "steps": steps,
                    "distance": lab.perceptual[0], "twice the steps": plus_minus(mean_error(more[:, 0]), 4),
                    "checked": k, "tests": tests})


def ablation_table(results):
    here = f"{results['distance']}, here"
    rows = [["trained on", *(f"{test}: {what}" for test in TESTS for what in ("LPIPS, paper", here, "squared error"))]]
    for name, called in {"coarse edit": "(the coarse edit itself)", **CALLED}.items():
        row = [called]
        for test in TESTS:
            found = results["tests"].get(test, {}).get(name)
            row += [f"{PAPER[name][test]:.3f}" if name in PAPER else "",
                    plus_minus(found["distance"], 4) if found else "not measured",
                    plus_minus(found["squared"]) if found else ""]
        rows.append(row)
    return rows


def ablation_verdict(results):
    """The order of the table, one comparison after another, each by the standard error of its differences. What the
    paper's own errors do not separate (training on flow and on both, tested on flow) is not asked for here either."""
    parts = []

    def compare(test, who, sign, what):
        """Is the distance of `who` surely larger (sign 1) or smaller (-1) than that of the other models?"""
        all_less = results["tests"].get(test, {}).get(who, {}).get("others less this", {})
        found = {other: all_less[other] for other in CALLED if other in all_less and other != who}
        sure = [other for other, (d, e) in found.items() if -sign * d > 2 * e]
        asked = [n for n in found if abs(PAPER[n][test] - PAPER[who][test]) > 2 * 0.01]  # beyond both errors, together
        contrary = [other for other, (d, e) in found.items() if sign * d > 2 * e]
        open_ = [other for other in found if other not in sure and other in asked + contrary]

        def told(names):
            return ", ".join(f"{CALLED[n]} ({-found[n][0]:+.4f} ± {found[n][1]:.4f})" for n in names)

        for names, held in ((sure, True), (open_, False)):
            if names:
                how = f"is {'' if held else 'not '}surely {what} than on"
                parts.append((held, f"tested on {test}, training on {CALLED[who]} {how} {told(names)}"))

    for test in TESTS:
        compare(test, ALONE, 1, "worse")
    compare("flow", FLOW, -1, "better")
    return with_missing(results["missing"], *parts)


# ---------------------------------------------------------------------------------------------------------------------
# The four models


def main(argv=None):
    parser = Parser(prog="python -m reproduce.mfx_ablation", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args, rest = parser.parse_known_args(argv)
    for name, how in TRAINED.items():
        out = args.out / name
        if place_of(args.out, name):
            print(f"{out}: finished")
            continue
        resume = ["--resume"] if list_states(out, "mfx") else []
        train.main(["--out", str(out), *how, *TRAINING, *resume, *rest])
    print(f"python -m reproduce --only ablation cross_reference mfx_figure4 mfx_figure9 --ablation-weights {args.out}")


if __name__ == "__main__":
    main()
