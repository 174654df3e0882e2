"""A byte-pair vocabulary for the toy's captions. Real Stable Diffusions bring CLIP's own."""

from collections import Counter
from itertools import pairwise

from clip import ALPHABET, END, START, build_vocab, clean_text, merge, spell, split_words


def learn_bpe(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn a byte-pair vocabulary of at most `size` symbols from texts.

    -> (symbol -> id, merges in order). There are fewer symbols if every word is one before that.
    Equal counts go to the alphabetically first pair, so the order of the texts does not matter.
    ValueError if `size` leaves no room for the byte alphabet and the special tokens (514).
    """
    if size < len(ALPHABET) + 2:
        raise ValueError(f"a vocabulary needs at least {len(ALPHABET) + 2} symbols, not {size}")
    counts = Counter()
    for text in texts:
        counts.update(split_words(clean_text(text)))
    words = [(spell(word), n) for word, n in counts.items() if word not in (START, END)]

    known = set(ALPHABET)
    merges = []
    while len(known) + 2 < size:
        # The most frequent pair of neighbours becomes a symbol.
        pairs = Counter()
        for symbols, n in words:
            for pair in pairwise(symbols):
                pairs[pair] += n
        if not pairs:
            break
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(pair)
        known.add("".join(pair))
        words = [(merge(symbols, pair), n) for symbols, n in words]
    return build_vocab(merges), merges
