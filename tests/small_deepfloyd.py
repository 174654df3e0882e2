"""Small parts of a DeepFloyd IF, with random weights and a made-up vocabulary, and their files."""

import base64
import json
import math
import random
import struct
import zlib

from models import t5
from tests.small import CAPTIONS

# What SentencePiece 0.2.3 makes of seven rules: the ligature fi, a tab, e with a combining acute, a circled 1, a square
# km, an ideographic space, and a space of no width, which goes
CHARMAP = zlib.decompress(base64.b64decode(
    "eNol03fwD2QYAPDn98Ud5/wjznaUZKWfvUrL3pItm2xltPEj2XsVRT8je2bvXdkUWkLUVXeiSVb1+fLefe557n2eu/d977k3MkZEoYgs2SJSItKO5k7E"
    "8EwRWeVpxRIxvkpEepZIrrQMyb2HI+apZ5avDL2vS/okwlbaA5qyk5Mc5GLqnUTkEXOTj7wUID+TUhNRUCx8/wrxEA/iiCjCIxSlOMUoSQkepRSPUZoy"
    "pFKOslSgPJWoiCdEZapRlSd4nCepztM8xbM8Q01qUJta1KUO9alHQxrQmEY0pQnNeI7mPE9LWtCaVrSlDS/Qjg60pxMd6UJnutGVF+lOT3rQm170TfaM"
    "SUR/sR8v8xIDGcBgBvEqr2BE8Rpv8gZDeIthDGV4cri8zQjeYSSjGcVYxjCecUxkApOTM0zOmClMZxozmcG7zGI27/E+c5jLB3zIPOaTzkIW8BGLWMJi"
    "lrGUFSxnFStZw2rWsZb1fMxGNrCZTWxlC9vZxk52sJtd7GUP+9nHQQ7wKZ9wiM84wmGOcZQTHOcUJ/mCzznDab7kLF/zFd/yDd9xjguc53sucplL/MgP"
    "/MS1HCnxi/hzsrY2JS5fSYlf5VeSNa7yO7/xJ3/wN39xg+vc5B9uc4u73OE//o17n69MdO8ZvfvG/mXxP9HIkUw="))
TEXTS = [*CAPTIONS, "", "   two  spaces ", "zebras", "日本 語", "a ﬁne\t①㎞\u3000rocket\u200bs", "cafe\u0301",
         "\U0001f642\U0001f642 x"]


def make_pieces():
    """All short parts of words in the captions, each of a probability of its own; the others are not known."""
    parts = {"▁"}
    for word in " ".join(CAPTIONS).split():
        word = "▁" + word
        parts |= {word[i : i + n] for n in range(1, 6) for i in range(len(word))}
    draw = random.Random(0)
    special = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, t5.UNKNOWN)]
    # SentencePiece stores scores in single precision.
    scores = struct.unpack(f"<{len(parts)}f", struct.pack(f"<{len(parts)}f", *(draw.uniform(-9, -3) for _ in parts)))
    return special + [(part, score, t5.NORMAL) for part, score in zip(sorted(parts), scores)]


PIECES = make_pieces()
T5 = t5.T5Config(vocab_size=len(PIECES), width=32, layers=3, heads=2, head_width=12, mlp_width=48)


def encode_field(number, value):
    """A field of a protobuf message: bytes, a float or a small int"""
    if isinstance(value, bytes):
        size = bytes([len(value) & 127 | 128, len(value) >> 7]) if len(value) > 127 else bytes([len(value)])
        return bytes([number << 3 | 2]) + size + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3, value])


def write_spiece(folder):
    """spiece.model, as SentencePiece writes it: with a trainer's settings, which nobody reads"""
    message = encode_field(2, encode_field(3, 1) + encode_field(10, 0.9995))
    for text, score, kind in PIECES:
        piece = encode_field(1, text.encode()) + encode_field(2, score)
        message += encode_field(1, piece if kind == t5.NORMAL else piece + encode_field(3, kind))
    message += encode_field(3, encode_field(1, b"nmt_nfkc") + encode_field(2, CHARMAP))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(message)


def write_json(folder, nested=False):
    """tokenizer.json, as transformers writes it"""
    charmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARMAP).decode()}
    special = [{"id": i, "content": text} for i, (text, _, kind) in enumerate(PIECES) if kind != t5.NORMAL]
    model = {"type": "Unigram", "unk_id": 2, "vocab": [[text, score] for text, score, _ in PIECES]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({
        "normalizer": {"type": "Sequence", "normalizers": [charmap]} if nested else charmap,
        "added_tokens": special, "model": model}))


def cut_by_trying_all(word):
    """The likeliest of all ways to cut a word into pieces -> ids"""
    known = {text: (i, score) for i, (text, score, kind) in enumerate(PIECES) if kind == t5.NORMAL}
    unknown = min(score for _, score in known.values()) - 10
    best = -math.inf, []
    for cuts in range(2 ** (len(word) - 1)):
        parts, start = [], 0
        for end in range(1, len(word) + 1):
            if end == len(word) or cuts >> (end - 1) & 1:
                parts.append(word[start:end])
                start = end
        if all(part in known or len(part) == 1 for part in parts):
            found = [known.get(part, (2, unknown)) for part in parts]
            best = max(best, (sum(score for _, score in found), [i for i, _ in found]))
    return [i for n, i in enumerate(best[1]) if not (i == 2 and n and best[1][n - 1] == 2)]
