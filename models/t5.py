"""The words of DeepFloyd IF: T5's encoder and its SentencePiece tokenizer.

The encoder is T5 v1.1: Raffel et al. 2020, arXiv 1910.10683, with the gated GELU of Shazeer 2020, arXiv 2002.05202. The
tokenizer is a unigram model: Kudo 2018, arXiv 1804.10959. IF reads a prompt as 77 vectors of width 4096, padding too.
"""

import base64
import json
import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoints.configs import read_sizes, refuse_other_options

# ----------------------------------------------------------------------------------------------------------------------
# The encoder


@dataclass(frozen=True)
class T5Config:
    """The sizes of a T5 encoder. The defaults are T5-XXL's."""

    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    buckets: int = 32  # of distances between tokens, for the tokens before and those behind
    distance: int = 128  # all from here on share a bucket


KEYS = {
    "vocab_size": "vocab_size", "width": "d_model", "layers": "num_layers", "heads": "num_heads", "head_width": "d_kv",
    "mlp_width": "d_ff", "buckets": "relative_attention_num_buckets", "distance": "relative_attention_max_distance",
}


def config_from_json(c):
    """The content of transformers' config.json -> T5Config. KeyError or ValueError as in checkpoints/configs.py"""
    refuse_other_options(c, {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6})
    return T5Config(**read_sizes({"relative_attention_max_distance": 128} | c, KEYS))


class RMSNorm(nn.Module):
    """x over its root mean square, which is taken in single precision."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
        return self.weight * x.to(self.weight.dtype)


class Attention(nn.Module):
    def __init__(self, c: T5Config, first):
        super().__init__()
        self.heads = c.heads
        inner = c.heads * c.head_width
        self.q = nn.Linear(c.width, inner, bias=False)
        self.k = nn.Linear(c.width, inner, bias=False)
        self.v = nn.Linear(c.width, inner, bias=False)
        self.o = nn.Linear(inner, c.width, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(c.buckets, c.heads)

    def forward(self, x, bias):
        """x (B, L, D), bias (B, heads, L, L) -> (B, L, D)"""
        qkv = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        # T5 does not divide by the root of the width: its initial weights are smaller instead.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP. Modules without a forward only give the parameters their names."""

    def __init__(self, c: T5Config, first):
        super().__init__()
        self.layer = nn.ModuleList([nn.Module(), nn.Module()])
        for sublayer in self.layer:
            sublayer.layer_norm = RMSNorm(c.width)
        self.layer[0].SelfAttention = Attention(c, first)
        self.layer[1].DenseReluDense = nn.ModuleDict({
            name: nn.Linear(*sizes, bias=False) for name, sizes in {
                "wi_0": (c.width, c.mlp_width), "wi_1": (c.width, c.mlp_width), "wo": (c.mlp_width, c.width)}.items()})

    def forward(self, x, bias):
        x = x + self.layer[0].SelfAttention(self.layer[0].layer_norm(x), bias)
        y, mlp = self.layer[1].layer_norm(x), self.layer[1].DenseReluDense
        return x + mlp["wo"](F.gelu(mlp["wi_0"](y), approximate="tanh") * mlp["wi_1"](y))


class T5(nn.Module):
    """T5's encoder. Attribute names are the keys of transformers' T5EncoderModel.

    Its activations overflow in fp16. It computes in bf16, as DeepFloyd runs it, or in fp32.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(config, first=i == 0) for i in range(config.layers))
        self.encoder.final_layer_norm = RMSNorm(config.width)

    def forward(self, ids, mask):
        """ids (B, L) of int64, mask (B, L) of bool, False = padding, which no token looks at -> (B, L, width)"""
        x = self.shared(ids)
        bias = self.position_bias(ids.shape[1]).masked_fill(~mask[:, None, None], float("-inf"))
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def position_bias(self, L):
        """What the way from one token to another adds to their attention, in all layers alike -> (1, heads, L, L)

        Half of the buckets are for the tokens behind. Half of each half are exact, the others grow with the logarithm.
        """
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        half = self.config.buckets // 2
        exact = half // 2
        place = torch.arange(L, device=table.weight.device)
        way = place[None, :] - place[:, None]
        distance = way.abs()
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(self.config.distance / exact)
        far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(distance < exact, distance, far) + half * (way > 0)
        return table(bucket).permute(2, 0, 1)[None]


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer: of all ways to cut a text into known pieces, the likeliest

PAD, END = 0, 1  # T5's ids
UNKNOWN_PENALTY = 10  # an unknown character's log probability lies so far below the rarest piece's
NORMAL, UNKNOWN = 1, 2  # SentencePiece's kinds of pieces; the others do not occur in texts


def read_int(message, i):
    """A protobuf's int at byte i, seven bits a byte, the lowest first -> it, and where it ends"""
    value = shift = 0
    while message[i] > 127:
        if shift > 63:
            raise ValueError("a number without an end")
        value |= (message[i] & 127) << shift
        shift += 7
        i += 1
    return value | message[i] << shift, i + 1


def read_fields(message):
    """The (number, value) pairs of a protobuf message, bytes. A value is an int, or bytes."""
    i = 0
    while i < len(message):
        key, i = read_int(message, i)
        wire = key & 7  # how the value is stored: an int, four bytes, or bytes behind their number
        value, i = (4, i) if wire == 5 else read_int(message, i)
        if wire:
            value, i = message[i : i + value], i + value
        yield key >> 3, value


def read_spiece(file):
    """spiece.model, SentencePiece's own -> pieces, charmap: as `Tokenizer` takes them"""
    pieces = []
    charmap = b""
    for number, value in read_fields(file.read_bytes()):
        if number == 1:
            piece = dict(read_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        if number == 3:
            charmap = dict(read_fields(value)).get(2, b"")
    return pieces, charmap


def read_tokenizer_json(file):
    """tokenizer.json, transformers' -> the same"""
    c = json.loads(file.read_text(encoding="utf-8"))
    special = {token["id"] for token in c["added_tokens"]}
    pieces = []
    for i, (text, score) in enumerate(c["model"]["vocab"]):
        kind = UNKNOWN if i == c["model"]["unk_id"] else 0 if i in special else NORMAL
        pieces.append((text, score, kind))
    normalizer = c["normalizer"] or {}
    charmap = b""
    for step in normalizer.get("normalizers", [normalizer]):
        if "precompiled_charsmap" in step:
            charmap = base64.b64decode(step["precompiled_charsmap"])
    return pieces, charmap


class CharMap:
    """SentencePiece's table of what is written instead of what: 'fi' for 'ﬁ', a space for a tab.

    charmap  the size of a trie over UTF-8 bytes; the trie, a double array (Aoe 1989) of 32-bit units; the replacements,
             each with a zero byte behind it
    """

    def __init__(self, charmap):
        (size,) = struct.unpack("<I", charmap[:4])
        self.units = struct.unpack(f"<{size // 4}I", charmap[4 : 4 + size])
        self.replacements = charmap[4 + size :]

    def __call__(self, text):
        data = text.encode(errors="replace")
        out = []
        i = 0
        while i < len(data):
            n, place = self.find_longest(data[i : i + 32])
            if n:
                out.append(self.replacements[place : self.replacements.index(0, place)])
            else:  # a character as it is: its first byte says its length
                n = 1 + (data[i] >= 0xC0) + (data[i] >= 0xE0) + (data[i] >= 0xF0)
                out.append(data[i : i + n])
            i += n
        return b"".join(out).decode()

    def find_longest(self, data):
        """Bytes -> how many of the first are replaced together, and where the replacement begins; 0, 0 if none are"""
        found = 0, 0
        place = offset(self.units[0])
        for n, byte in enumerate(data, 1):
            place ^= byte
            unit = self.units[place]
            if unit & 0x800000FF != byte:  # no way from here by this byte
                break
            place ^= offset(unit)
            if unit & 0x100:  # a key ends here
                found = n, self.units[place] & 0x7FFFFFFF
        return found


def offset(unit):
    """From a unit of the trie to those behind it"""
    return unit >> 10 << (unit >> 6 & 8)


class Tokenizer:
    """Text -> the ids that a T5 encoder reads, as SentencePiece and transformers make them.

    pieces   [(text, log probability, kind)], in the order of their ids
    charmap  for `CharMap`, b"" for none
    """

    length = 77

    def __init__(self, pieces, charmap=b""):
        self.normalize = CharMap(charmap) if charmap else str
        kinds = [kind for _, _, kind in pieces]
        self.unknown = kinds.index(UNKNOWN)
        self.size = len(pieces)
        self.pieces = {}
        for i, (text, score, kind) in enumerate(pieces):
            if kind == NORMAL:
                self.pieces[text] = i, score
        self.longest = max(map(len, self.pieces))
        self.unknown_score = min(score for _, score in self.pieces.values()) - UNKNOWN_PENALTY

    @classmethod
    def load(cls, folder):
        """Read spiece.model, or tokenizer.json, in a folder.

        FileNotFoundError if there is neither, ValueError if the file is damaged.
        """
        for name, read in (("spiece.model", read_spiece), ("tokenizer.json", read_tokenizer_json)):
            file = Path(folder) / name
            if file.is_file():
                try:
                    return cls(*read(file))
                except Exception as e:  # damaged files can fail in any way
                    raise ValueError(f"{file} is damaged ({e!r:.80}): copy it again") from e
        raise FileNotFoundError(f"no tokenizer in {folder}: put spiece.model, or tokenizer.json, there")

    def encode(self, text):
        """Text -> ids, without end, padding or a limit. ValueError if the table of characters is damaged."""
        try:
            text = self.normalize(text)
        except (IndexError, ValueError):  # a trie leads to where nothing is
            raise ValueError("T5's tokenizer is damaged: copy its spiece.model, or tokenizer.json, again") from None
        ids = []
        for word in text.split(" "):
            if word:
                ids += self.cut("▁" + word)
        return ids

    def cut(self, word):
        """The likeliest way to cut a word into pieces, by Viterbi's algorithm -> ids. What is unknown is one piece."""
        best = [(0.0, 0, self.unknown)]  # at each place: score, where the last piece begins, its id
        for end in range(1, len(word) + 1):
            ways = []
            for start in range(max(0, end - self.longest), end):
                if found := self.pieces.get(word[start:end]):
                    i, score = found
                    ways.append((best[start][0] + score, start, i))
            if word[end - 1] not in self.pieces:
                ways.append((best[end - 1][0] + self.unknown_score, end - 1, self.unknown))
            best.append(max(ways, key=lambda way: way[0]))

        ids = []
        end = len(word)
        while end:
            _, end, i = best[end]
            if i != self.unknown or ids[-1:] != [i]:
                ids.append(i)
        return ids[::-1]

    def __call__(self, texts):
        """B texts -> ids (B, 77) of int64, at most 76 tokens, end and padding; mask (B, 77) of bool, False = padding

        A longer text is cut, with a warning.
        """
        ids = torch.full((len(texts), self.length), PAD)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for i, text in enumerate(texts):
            tokens = self.encode(text)
            if len(tokens) >= self.length:
                warnings.warn(f"the prompt has {len(tokens)} tokens, and {self.length - 1} are read", stacklevel=2)
            tokens = [*tokens[: self.length - 1], END]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
        return ids, mask
