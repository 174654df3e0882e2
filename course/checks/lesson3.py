"""Lesson 3's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import math

import torch
import torch.nn.functional as F

import clip
from course.grading import Wrong, call, compare, compare_function, draw, list_mistakes, predicted, resting_on
from course.solutions import lesson3 as right


def check_PREDICT_FIRST_CHANGED(module):
    text = clip.TextEncoder(clip.TextConfig(vocab_size=16, width=8, layers=2, heads=2, mlp_width=16, eos=15))
    for p in text.parameters():
        p.requires_grad_(False)
    # start, a, red, ball, on, snow or sand, at, night, end, padding
    ids = torch.tensor([[14, 0, 1, 2, 3, word, 6, 7, *[15] * 69] for word in (4, 5)])
    one, other = text(ids)
    first = (one - other).abs().amax(-1).gt(1e-6).nonzero()[0].item()
    predicted(module.PREDICT_FIRST_CHANGED, first, {
        "the start of the text is a token too, number 0: every word stands one place later": 4,
        "no word sees those after it, so the vectors before the changed word stay: the attention is causal": 0,
        "the changed word's own vector changes as well, not only those after it": 6,
        "that is the end of the text, where all is summed up: but the UNet reads all 77 vectors": 8,
    })


def first_only(symbols, pair):
    for i in range(len(symbols) - 1):
        if tuple(symbols[i : i + 2]) == pair:
            return symbols[:i] + ["".join(pair)] + symbols[i + 2 :]
    return symbols


def overlapping(symbols, pair):
    out = list(symbols[:1])
    for before, symbol in zip(symbols, symbols[1:]):
        if (before, symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def any_order(symbols, pair):
    out = []
    i = 0
    while i < len(symbols):
        n = 2 if sorted(symbols[i : i + 2]) == sorted(pair) else 1
        out.append("".join(symbols[i : i + n]))
        i += n
    return out


def lose_the_last(symbols, pair):
    out = []
    i = 0
    while i < len(symbols) - 1:
        n = 2 if tuple(symbols[i : i + 2]) == pair else 1
        out.append("".join(symbols[i : i + n]))
        i += n
    return out


WRONG_MERGES = {
    "only the first place is merged: the pair may stand at several": first_only,
    "a symbol is merged twice: after a merge go on behind both symbols": overlapping,
    "the pair is merged in either order: b, a is not a, b": any_order,
    "the last symbol is lost where it is in no pair": lose_the_last,
}


def check_merge(module):
    # Each word finds some of the mistakes.
    for symbols, pair in [
        (["a", "n", "a", "n", "a", "s</w>"], ("a", "n")),
        (["o", "o", "o", "o", "h</w>"], ("o", "o")),
        (["b", "a", "a", "b", "c</w>"], ("a", "b")),
        (["n", "i", "g", "h", "t</w>"], ("h", "t</w>")),
    ]:
        before = list(symbols)
        got = call(module.merge, symbols, pair)
        if symbols != before:
            raise Wrong("it changes the list that it is given: make a new one")
        slips = {sentence: wrong(before, pair) for sentence, wrong in WRONG_MERGES.items()}
        compare(got, clip.merge(before, pair), slips)


def check_causal_mask(module):
    compare_function(module.causal_mask, lambda L: torch.ones(L, L).tril().bool(), WRONG_TRIANGLES, 5)


WRONG_TRIANGLES = {
    "the triangle is the wrong one: row i is the token that looks, column j what it looks at":
        lambda L: right.causal_mask(L).mT,
    "off by one step: a token sees itself too": lambda L: right.causal_mask(L).tril(-1),
    "off by one step: a token sees the one after it": lambda L: torch.ones(L, L).tril(1).bool(),
    "every token sees every other": lambda L: torch.ones(L, L).bool(),
}


def check_attention(module):
    q, k, v = draw((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    mask = right.causal_mask(5)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.mT

    def attend(scores, dim=-1):
        return scores.masked_fill(~mask, -math.inf).softmax(dim) @ v

    compare(call(module.attention, q, k, v, mask), want, {
        "the scores are not divided by sqrt(d)": attend(scores),
        "the scores are divided by d, not by its square root": attend(scores / 4),
        "the softmax goes over the wrong dimension: for each query the weights of all keys add up to 1":
            attend(scores / 2, dim=-2),
        "the mask is not used": (scores / 2).softmax(-1) @ v,
        "the mask comes after the softmax: then the weights no longer add up to 1":
            ((scores / 2).softmax(-1) * mask) @ v,
        "the mask is the wrong way round: True is where a query may look":
            (scores / 2).masked_fill(mask, -math.inf).softmax(-1).nan_to_num() @ v,
        "the mask is added: True counts as 1, which hides nothing. Where it is False the score is minus infinity":
            (scores / 2 + mask).softmax(-1) @ v,
        "what is masked has a score of 0, which is still a weight: it has to be minus infinity":
            (scores / 2).masked_fill(~mask, 0).softmax(-1) @ v,
    })


def check_guide(module):
    u, c = draw((2, 3, 4, 4), (2, 3, 4, 4))
    compare_function(module.guide, lambda u, c, w: u + w * (c - u), WRONG_GUIDES, u, c, 3.0)


WRONG_GUIDES = {
    "the two are the wrong way round: w = 1 should give the prompt, and gives none": lambda u, c, w: c + w * (u - c),
    "it is off by one in w: this is 1 + w, as the paper writes it; here w = 1 is the prompt alone":
        lambda u, c, w: c + w * (c - u),
    "the starting point is missing: add the direction to `unconditional`": lambda u, c, w: w * (c - u),
    "the sign of the direction is wrong: from `unconditional` to `conditional`": lambda u, c, w: u - w * (c - u),
    "that is a mean of the two: guidance goes beyond the prompt": lambda u, c, w: (u + w * c) / (1 + w),
}


def check_denoise_guided(module):
    z, context, empty = draw((2, 3, 4, 4), (2, 7, 5), (2, 7, 5))
    t, w = torch.tensor([500, 20]), 3.0
    calls = []

    def unet(z, t, context):
        if not len(z) == len(t) == len(context):
            sizes = f"{len(z)}, {len(t)} and {len(context)}"
            raise Wrong(f"z, t and context have batches of {sizes}: all three are doubled")
        calls.append(len(z))
        scale = context.mean((1, 2)) + t / 1000
        return z * scale[:, None, None, None] + z**2

    with resting_on(module.guide, z, z, w, called=calls):
        got = call(module.denoise_guided, unet, z, t, context, empty, w)
    if calls != [4]:
        raise Wrong(f"the network is called {len(calls)} times: once is enough, with a batch of twice the size")
    u, c = unet(z, t, empty), unet(z, t, context)
    compare(got, u + w * (c - u), {
        "the halves are the wrong way round: take them apart in the order in which you put them together":
            c + w * (u - c),
        "that is the prompt without guidance": c,
        "the guidance is applied before the network": unet(z, t, empty + w * (context - empty)),
    })


def forget_t(unet, z, t, context, empty, w):
    u, c = unet(torch.cat([z, z]), t, torch.cat([empty, context])).chunk(2)
    return right.guide(u, c, w)


MISTAKES = {
    "PREDICT_FIRST_CHANGED": [(4, "one place later"), (0, "causal"), (6, "own vector"), (8, "all 77")],
    "merge": list_mistakes(WRONG_MERGES),
    "causal_mask": [
        *list_mistakes(WRONG_TRIANGLES),
        (lambda L: ~right.causal_mask(L), "wrong way round"),
        (lambda L: right.causal_mask(L + 1), "shape"),
    ],
    "attention": [
        (lambda q, k, v, mask: right.attention(q * 2, k, v, mask), "not divided"),
        (lambda q, k, v, mask: right.attention(q / 2, k, v, mask), "by d"),
        (lambda q, k, v, mask: right.attention(q, k, v, torch.ones_like(mask)), "not used"),
        (lambda q, k, v, mask: (q @ k.mT / 2 + mask).softmax(-1) @ v, "is added"),
        (lambda q, k, v, mask: ((q @ k.mT / 2).softmax(-1) * mask) @ v, "after the softmax"),
        (lambda q, k, v, mask: (q @ k.mT / 2).masked_fill(~mask, -math.inf).softmax(-2) @ v, "dimension"),
    ],
    "guide": list_mistakes(WRONG_GUIDES),
    "denoise_guided": [
        (lambda unet, z, t, context, empty, w: right.denoise_guided(unet, z, t, empty, context, w), "halves"),
        (lambda unet, z, t, context, empty, w: right.guide(unet(z, t, empty), unet(z, t, context), w),
         "once is enough"),
        (forget_t, "all three are doubled"),
        (lambda *given: right.denoise_guided(*given[:-1], 1.0), "without guidance"),
    ],
}
