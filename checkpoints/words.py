"""Learned words: textual inversion, Gal et al. 2022, arXiv 2208.01618. Rows of the text encoder's table that were
trained to mean something, each a token of its own, which no other text is spelled with.

    tokenizer = load_tokenizer(folder)        a folder's added words, as diffusers and transformers leave them
    learn_word(sd.load("weights/toy"), "my-cat.pt")         one file's, added to a model
"""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import clip
from checkpoints.read import FLOATS, read_content
from common.files import read_json


class WordTokenizer(clip.Tokenizer):
    """CLIP's tokenizer, with words beyond its vocabulary: {word: id}.

    A word of several tokens is listed as word, word_1, word_2, as diffusers does, and is written as the first.
    """

    def __init__(self, vocab, merges, pad, added):
        super().__init__(vocab, merges, pad)
        self.added = added
        patterns = []
        for word, i in sorted(added.items(), key=lambda item: -len(item[0])):  # the longest that fits
            if not (isinstance(word, str) and type(i) is int and i >= 0 and clip.clean_text(word)):
                raise ValueError(f"the added word {str(word):.60} has no id")
            ids = [i]
            while f"{word}_{len(ids)}" in added:
                ids.append(added[f"{word}_{len(ids)}"])
            cleaned = clip.clean_text(word)
            self.cache[cleaned] = ids
            self.symbols[i] = cleaned
            # "art" is no part of "party"
            before, after = r"\b" * cleaned[0].isalnum(), r"\b" * cleaned[-1].isalnum()
            patterns.append(before + re.escape(cleaned) + after)
        self.pattern = re.compile(f"({'|'.join(patterns)})")

    def encode(self, text):
        ids = []
        for i, piece in enumerate(self.pattern.split(clip.clean_text(text))):
            words = [piece] if i % 2 else clip.split_words(piece)  # every second piece is a word that was added
            ids += [i for word in words for i in self.encode_word(word)]
        return ids

    def decode(self, ids):
        added = set(self.added.values())
        return " ".join(self.symbols[i] if i in added else super(WordTokenizer, self).decode([i]) for i in ids)

    def save(self, folder):
        super().save(folder)
        text = json.dumps(self.added, ensure_ascii=False, indent=2)
        (Path(folder) / "added_tokens.json").write_text(text, encoding="utf-8", newline="\n")


def add_words(tokenizer, added):
    """-> the tokenizer, with these words as well: {word: id}"""
    added = getattr(tokenizer, "added", {}) | added
    return WordTokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.pad, added) if added else tokenizer


def check_tokenizer(path, tokenizer, text):
    """-> the tokenizer, or None, without added words that this text encoder does not know: those are spelled out

    ValueError if it is another text encoder's.
    """
    t = text.config
    if t.length < clip.Tokenizer.length:
        raise ValueError(f"{path}: its text encoder reads {t.length} tokens, and not 77")
    if tokenizer and max(tokenizer.vocab.values()) >= t.vocab_size:
        raise ValueError(f"{path}: its tokenizer is not the text encoder's, which knows {t.vocab_size} symbols only")
    added = getattr(tokenizer, "added", {})
    known = {word: i for word, i in added.items() if i < t.vocab_size}
    if known == added:
        return tokenizer
    absent = ", ".join(word for word in added if word not in known)
    warnings.warn(f"{path}: its text encoder does not know the added words {absent:.200}, which are spelled out",
                  stacklevel=4)
    return add_words(clip.Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.pad), known)


def load_tokenizer(folder, pad=None):
    """As `clip.Tokenizer.load`, with the words that were added to a folder."""
    folder = Path(folder)
    tokenizer = clip.Tokenizer.load(folder, pad)

    # Three files may say so. The vocabulary's own symbols are listed there as well.
    added = dict(read_json(folder / "added_tokens.json", default={}))
    try:
        listed = read_json(folder / "tokenizer_config.json", default={}).get("added_tokens_decoder", {})
        added |= {token["content"]: int(i) for i, token in listed.items()}
        listed = read_json(folder / "tokenizer.json", default={}).get("added_tokens", [])
        added |= {token["content"]: token["id"] for token in listed}
        return add_words(tokenizer, {word: i for word, i in added.items() if word not in tokenizer.vocab})
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"the tokenizer at {folder} is damaged (its added words: {e}): copy it again") from None


# ---------------------------------------------------------------------------------------------------------------------
# One file


def learn_word(model, path):
    """Add the word of a file (`read_word`) to a StableDiffusion, in place -> what prompts call it, one name or two

    ValueError if it is for another text encoder, or is something else.
    """
    if model.xl:
        raise ValueError(f"{path}: learned words go with Stable Diffusion 1 and 2, not with an XL")
    words, rows = read_word(path)
    table, config = model.text.text_model.embeddings.token_embedding, model.text.config
    if rows.shape[1] != config.width:
        raise ValueError(f"{path} was learned for a text encoder of width {rows.shape[1]}, and this one has "
                         f"{config.width}")
    if model.tokenizer is None:
        raise ValueError(f"a learned word needs a tokenizer: {model.tokenizer_help}")
    added = {}
    for word in words:
        if word in getattr(model.tokenizer, "added", {}):
            raise ValueError(f"{path} is the word {word}, which another file is already: rename one")
        first = len(table.weight)
        added |= {f"{word}_{i}" if i else word: first + i for i in range(len(rows))}
        table.weight = torch.nn.Parameter(torch.cat([table.weight, rows.to(table.weight)]), requires_grad=False)
    model.text.config = replace(config, vocab_size=len(table.weight))
    model.tokenizer = add_words(model.tokenizer, added)
    return words


def read_word(path):
    """A file of one learned word -> what it is called, one name or two, and rows (n, D) of the text encoder's table

    .safetensors, .pt or .bin, as diffusers, the original program, AUTOMATIC1111's and kohya's write it. A file
    without a name in it is called as the file is. ValueError if it is something else.
    """
    content, stem = read_content(path), Path(path).stem
    if {"clip_l", "clip_g"} & content.keys():
        raise ValueError(f"{path} is a learned word for Stable Diffusion XL, which is not read")
    if isinstance(content.get("string_to_param"), dict):
        found, words = content["string_to_param"], [stem, content.get("name")]
    else:
        found = {name: value for name, value in content.items() if torch.is_tensor(value)}
        words = [stem if name in ("*", "emb_params") else name for name in found]
    rows = next(iter(found.values()), None)
    one = len(found) == 1 and torch.is_tensor(rows) and rows.dtype in FLOATS
    if not one or rows.ndim not in (1, 2) or not rows.shape[-1]:
        raise ValueError(f"{path} is not a learned word: expected one (D) or (n, D) tensor, of textual inversion")
    if not rows.float().isfinite().all():
        raise ValueError(f"{path} is damaged: it is not finite")
    rows = rows.reshape(-1, rows.shape[-1])
    if not 1 <= len(rows) <= clip.Tokenizer.length - 2:
        raise ValueError(f"{path} is not a learned word: no prompt holds {len(rows)} tokens")
    words = dict.fromkeys(word for word in words if isinstance(word, str) and clip.clean_text(word))
    if not words:
        raise ValueError(f"{path} has no name: rename the file to what the word should be")
    return list(words), rows
