"""Prompts as the web UI of A1111 reads them: words with weights, and any number of words.

    (word:1.4)  1.4 times the weight      (word)  1.1 times, ((word)) 1.21      [word]  1 / 1.1
    \\(word\\)    brackets that are meant     BREAK  what follows goes into the next chunk

A text encoder reads 75 tokens. A longer prompt goes through it in chunks of 75, and the UNet sees
them one after another. A weight multiplies what the encoder makes of a token, after which the
chunk's mean is brought back to what it was. All this is A1111's own, and in neither paper.
"""

import math
import re
import warnings

import torch

import clip

PIECES = re.compile(r"\\[\\()\[\]]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
WEIGHTED = re.compile(r"\([^()]*:\s*[+-]?[.\d]+\s*\)")
UNKNOWN = re.compile(r"\[[^\[\]]*[:|][^\[\]]*\]|\bAND\b|<\w+:[^<>]*>")
BREAK = None  # in place of a text
AFTER_COMMA = 20  # so many tokens after a comma go into the next chunk rather than be torn apart


def list_texts(texts, name, count=None):
    """A string, or a list -> a list; one string becomes `count`. ValueError for another number."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{name} is a string, or a list of strings, not {texts!r}")
    if count and len(listed) == 1:
        listed = listed * count
    if count and len(listed) != count:
        raise ValueError(f"{name} has {len(listed)} strings: one, or {count}, were expected")
    return listed


def warn_of_weights(texts):
    """Weights where nobody reads them: they are spelled, digit by digit."""
    for text in texts:
        if found := WEIGHTED.search(text):
            warnings.warn(f"'{found[0]}' is read as it stands, digits and all: --a1111 (in Python "
                          "a1111=True) reads it as a weight", stacklevel=2)


def parse_weights(prompt):
    """Prompt -> [[text, weight]], the text BREAK between chunks. Brackets may be left open.

    ValueError for a weight that is no number.
    """
    parts = []
    opened = {"(": [], "[": []}  # where brackets were opened, as indices of `parts`

    def multiply(start, factor):
        for part in parts[start:]:
            part[1] *= factor

    for piece in PIECES.finditer(prompt):
        text, weight = piece.group(0, 1)
        if text[0] == "\\":
            parts.append([text[1:], 1.0])
        elif text in opened:
            opened[text].append(len(parts))
        elif weight and opened["("]:
            multiply(opened["("].pop(), read_weight(weight, text))
        elif text == ")" and opened["("]:
            multiply(opened["("].pop(), 1.1)
        elif text == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / 1.1)
        else:
            for i, words in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
                parts += [[BREAK, 1.0]] * (i > 0) + [[words, 1.0]]
    for start in opened["("]:
        multiply(start, 1.1)
    for start in opened["["]:
        multiply(start, 1 / 1.1)

    # Neighbours of one weight are one text: "(a)(b)" is the word "ab".
    joined = []
    for text, weight in parts:
        if joined and BREAK not in (text, joined[-1][0]) and weight == joined[-1][1]:
            joined[-1][0] += text
        else:
            joined.append([text, weight])
    return joined


def read_weight(number, text):
    try:
        if math.isfinite(weight := float(number)):
            return weight
    except ValueError:
        pass
    raise ValueError(f"the prompt has a weight that is no number: '{text}'")


def split_chunks(tokenizer, prompt):
    """-> ids (n, 77), weights (n, 77): start, 75 tokens at most, end, padding"""
    room = tokenizer.length - 2
    comma = tokenizer.encode(",")
    chunks = [[]]  # of (id, weight)
    for text, weight in parse_weights(prompt):
        if text is BREAK:
            chunks.append([])
            continue
        for token in tokenizer.encode(text):
            if len(chunks[-1]) == room:
                # What began after a comma near the end goes on in the next chunk.
                full = chunks.pop()
                commas = [i + 1 for i in range(room - AFTER_COMMA, room) if [full[i][0]] == comma]
                cut = commas[-1] if commas and [token] != comma else room
                chunks += [full[:cut], full[cut:]]
            chunks[-1].append((token, weight))
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()

    ids = torch.full((len(chunks), tokenizer.length), tokenizer.vocab[tokenizer.pad])
    weights = torch.ones(ids.shape)
    ids[:, 0] = tokenizer.vocab[clip.START]
    for row, chunk in enumerate(chunks):
        n = len(chunk)
        ids[row, n + 1] = tokenizer.vocab[clip.END]
        if chunk:
            ids[row, 1 : n + 1] = torch.tensor([token for token, _ in chunk])
            weights[row, 1 : n + 1] = torch.tensor([weight for _, weight in chunk])
    return ids, weights


def encode_weighted(text_encoder, tokenizer, prompts):
    """B prompts -> context (B, L, D), L a multiple of 77, and pooled (B, P), of the first 75 tokens as there

    A shorter prompt's context is repeated: keys that come n times, all of them, leave an attention
    as it is. So each prompt counts as if it were alone. ValueError for a weight that is no number.
    """
    contexts, pooled = [], []
    for prompt in prompts:
        if found := UNKNOWN.search(prompt):
            warnings.warn(f"'{found[0]}' is read as words: of A1111's language only weights and "
                          "BREAK are known", stacklevel=2)
        ids, weights = split_chunks(tokenizer, prompt)
        weight = text_encoder.text_model.final_layer_norm.weight
        context, ends = text_encoder.encode(ids.to(weight.device))
        pooled.append(ends[0])
        context = context.float()  # (n, 77, D)
        weighted = context * weights.to(weight.device)[..., None]
        # A1111 takes the mean over a whole batch. Over each chunk it is the same for one prompt.
        means = [x.mean((1, 2), keepdim=True) for x in (context, weighted)]
        contexts.append((weighted * (means[0] / means[1])).to(weight.dtype).flatten(0, 1))
    length = math.lcm(*map(len, contexts))
    context = torch.stack([context.repeat(length // len(context), 1) for context in contexts])
    return context, torch.stack(pooled)
