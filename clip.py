"""The words: CLIP's text encoder (2103.00020) and its byte-pair tokenizer (1508.07909).

Stable Diffusion never sees a prompt, only 77 vectors that one of three text encoders makes of it.
All three are the same network at different widths: CLIP ViT-L (SD 1.x), OpenCLIP ViT-H (SD 2.x),
and for SDXL ViT-L again together with OpenCLIP bigG.
"""

import html
import json
import re
import unicodedata
import warnings
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------------------------------
# The text encoder


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a text encoder, and which of its layers are read. The defaults are SD 1.x's."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 77
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # OpenAI's own weights; every OpenCLIP model has 'gelu'
    eos: int = 49407  # the pooled state stands at this id's first place
    skip_last: int = 0  # how many last layers the context leaves out: 1 = the penultimate layer
    final_norm: bool = True  # the context goes through the final layer norm; not in SDXL
    projection: int | None = None  # width of the projected pooled state; SDXL's second encoder's

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"the activation is gelu or quick_gelu, not {self.activation}")
        if self.width % self.heads:
            raise ValueError(f"a text encoder of width {self.width} cannot have {self.heads} heads")


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class Attention(nn.Module):
    causal = True  # a token sees itself and those before it; CLIP's network for pictures sees all

    def __init__(self, c: TextConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.width, c.width)
        self.k_proj = nn.Linear(c.width, c.width)
        self.v_proj = nn.Linear(c.width, c.width)
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x):
        """x (B, L, D) -> (B, L, D). Padding is not masked: Stable Diffusion reads its vectors."""
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width)
        self.self_attn = Attention(c)
        self.layer_norm2 = nn.LayerNorm(c.width)
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(c.width, c.mlp_width), "fc2": nn.Linear(c.mlp_width, c.width)})
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.activation(self.mlp["fc1"](self.layer_norm2(x)))
        return x + self.mlp["fc2"](hidden)


class TextEncoder(nn.Module):
    """CLIP's text transformer. Attribute names are the checkpoint's keys."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        # Modules without a forward only give the parameters their names.
        m = self.text_model = nn.Module()
        m.embeddings = nn.Module()
        m.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.width)
        m.embeddings.position_embedding = nn.Embedding(config.length, config.width)
        m.encoder = nn.Module()
        m.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        m.final_layer_norm = nn.LayerNorm(config.width)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

        # CLIP's initial scale: embeddings of unit variance would drown the layers.
        nn.init.normal_(m.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(m.embeddings.position_embedding.weight, std=0.01)

    def forward(self, ids):
        """ids (B, L) of int64, L <= 77 -> context (B, L, width), what the diffusion model reads"""
        return self.encode(ids)[0]

    def encode(self, ids):
        """ids (B, L) -> context (B, L, width) and pooled (B, projection, or width without one)

        Pooled is the last layer's state at the end of the text, after the final layer norm. CLIP
        compares it with an image, SDXL adds it to the timestep.
        """
        m = self.text_model
        positions = m.embeddings.position_embedding.weight[: ids.shape[1]]
        x = m.embeddings.token_embedding(ids) + positions  # (B, L, width)
        for i, layer in enumerate(m.encoder.layers):
            x = layer(x)
            if i == self.config.layers - 1 - self.config.skip_last:
                context = x
        if self.config.final_norm:
            context = m.final_layer_norm(context)

        end = (ids == self.config.eos).int().argmax(dim=1)  # (B,), the first: padding may be it
        pooled = m.final_layer_norm(x)[torch.arange(len(ids), device=ids.device), end]
        if self.config.projection:
            pooled = self.text_projection(pooled)
        return context, pooled


# --------------------------------------------------------------------------------------------------
# Cleaning and splitting text
#
# CLIP was trained on text cleaned by the ftfy package. `fix_text` does what ftfy's defaults do, but
# for repairing UTF-8 that was read as Latin-1, and HTML entities in capitals ("&EACUTE;").

START, END = "<|startoftext|>", "<|endoftext|>"


def build_character_table() -> dict[int, str]:
    """Repairs of single characters, for str.translate."""
    table = {0x3000: " ", ord("ﬅ"): "ſt"}
    for i in (*range(0xFF01, 0xFFF0), *map(ord, "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ")):
        table[i] = unicodedata.normalize("NFKC", chr(i))  # full- and half-width forms, ligatures
    for i in (0x2BC, *range(0x2018, 0x201C)):
        table[i] = "'"
    for i in range(0x201C, 0x2020):
        table[i] = '"'
    for i in range(0x80, 0xA0):
        table[i] = html.unescape(f"&#{i};")  # they stand for Windows-1252: HTML has that table
    return table


CHARACTERS = build_character_table()
CONTROLS = dict.fromkeys([*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF,
                          *range(0xFFF9, 0xFFFD)])


def fix_text(text: str) -> str:
    """Text -> the same text as ftfy's defaults leave it, but for the exceptions above."""
    lines = []
    has_markup = False
    for line in text.split("\n"):
        has_markup = has_markup or "<" in line  # from there on, "&lt;" may well be meant literally
        before = None
        while line != before:  # one repair can uncover the next
            before = line
            if not has_markup:
                line = re.sub("&#?[0-9A-Za-z]{1,24};", lambda e: html.unescape(e[0]), line)
            line = line.translate(CHARACTERS)
            # Pairs of surrogates are joined, halves of one are marked.
            line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            line = re.sub("\033\\[[0-9;]*[a-zA-Z]", "", line)  # a terminal's colours
            line = unicodedata.normalize("NFC", line.translate(CONTROLS))
        lines.append(line)
    return "\n".join(lines)


def clean_text(text: str) -> str:
    """CLIP's cleaning: repaired, HTML unescaped, single spaces, lower case."""
    return " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()


SPECIAL_OR_CONTRACTION = re.compile(r"<\|(start|end)oftext\|>|'(s|t|re|ve|m|ll|d)", re.IGNORECASE)
RUN = re.compile("L+|N|Z+|[^LNZ]+")


def split_words(text: str) -> list[str]:
    """Cleaned text -> contractions, runs of letters, single digits, runs of the rest but spaces.

    CLIP's pattern needs Unicode classes (`\\p{L}`), which `re` lacks. So each character's class (L,
    N, Z for spaces, ...) goes into a second string of equal length, where `re` finds the runs.
    """
    classes = "".join(unicodedata.category(c)[0] for c in text)
    words = []
    i = 0
    while i < len(text):
        match = SPECIAL_OR_CONTRACTION.match(text, i) or RUN.match(classes, i)
        j = match.end()
        if classes[i] != "Z":
            words.append(text[i:j])
        i = j
    return words


# --------------------------------------------------------------------------------------------------
# The tokenizer
#
# A word is spelled as its UTF-8 bytes, each byte as one printable character, and its last symbol
# carries "</w>". Then the pair of neighbours that was learned first is merged, again and again,
# until no learned pair is left.

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_SYMBOL = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
SYMBOL_BYTE = {symbol: b for b, symbol in BYTE_SYMBOL.items()}
ALPHABET = [*SYMBOL_BYTE, *(symbol + "</w>" for symbol in SYMBOL_BYTE)]  # ids 0 to 511
ARCHIVE = "bpe_simple_vocab_16e6.txt.gz"
ARCHIVE_MERGES = 49408 - 512 - 2  # the file holds many more merges than CLIP uses


def spell(word: str) -> list[str]:
    """'cat' -> ['c', 'a', 't</w>']"""
    symbols = [BYTE_SYMBOL[b] for b in word.encode("utf-8")]
    symbols[-1] += "</w>"  # a word's end
    return symbols


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """['c', 'a', 't</w>'], ('c', 'a') -> ['ca', 't</w>']"""
    out = []
    i = 0
    while i < len(symbols):
        n = 2 if tuple(symbols[i : i + 2]) == pair else 1
        out.append("".join(symbols[i : i + n]))
        i += n
    return out


def build_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Symbol -> id in CLIP's order: the alphabet, a symbol for each merge, the special tokens."""
    symbols = dict.fromkeys([*ALPHABET, *map("".join, merges), START, END])
    return {symbol: i for i, symbol in enumerate(symbols)}


def read_vocab(path):
    """The files that `Tokenizer.load` knows -> (symbol -> id, merges, pad symbol or None)"""
    archive = path / ARCHIVE if path.is_dir() else path
    pad = read_pad(path)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if not line.startswith("#version")]
    elif (path / "tokenizer.json").is_file():
        model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        vocab, merges = model["vocab"], model["merges"]
    elif archive.is_file():
        text = zlib.decompressobj(31).decompress(archive.read_bytes(), 2**24)  # it has 3 MB
        lines = text.decode("utf-8").split("\n")
        merges = lines[1 : ARCHIVE_MERGES + 1]
        if len(merges) < ARCHIVE_MERGES:
            raise ValueError(f"{len(merges)} of {ARCHIVE_MERGES} merges")
        vocab, pad = build_vocab([tuple(line.split()) for line in merges]), "!"
    else:
        raise FileNotFoundError(f"no tokenizer at {path}: it should be a folder with vocab.json and"
                                f" merges.txt (a Stable Diffusion's tokenizer/), or {ARCHIVE}")
    return vocab, [tuple(m.split() if isinstance(m, str) else m) for m in merges if m], pad


def read_pad(folder):
    """The symbol that pads, or None. Where the two files differ (SD 2) the first one wins."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            pad = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            if pad is not None:
                return pad["content"] if isinstance(pad, dict) else pad
    return None


class Tokenizer:
    """Text -> the ids that a CLIP text encoder reads.
    They are OpenAI's and open_clip's, and Hugging Face's for text that needs no cleaning.
    pad  the symbol after the end token: <|endoftext|> in SD 1 and SDXL's first encoder, "!" (id 0)
         in SD 2 and SDXL's second. ValueError if vocab and merges do not make a CLIP tokenizer
    """

    length = 77

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = END):
        for symbol in (*ALPHABET, START, END, pad):
            if symbol not in vocab:
                raise ValueError(f"the vocabulary has no {symbol!r}")
        if any(type(i) is not int or i < 0 for i in vocab.values()):
            raise ValueError("an id in the vocabulary is not a whole number from 0 on")
        for pair in merges:
            if len(pair) != 2 or "".join(pair) not in vocab:
                raise ValueError(f"the merge {' '.join(pair)!r} makes no symbol of the vocabulary")
        self.vocab, self.merges, self.pad = vocab, merges, pad
        self.symbols = {i: symbol for symbol, i in vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.cache = {START: [vocab[START]], END: [vocab[END]]}

    @classmethod
    def load(cls, path, pad: str | None = None) -> "Tokenizer":
        """Read a folder with vocab.json and merges.txt, or with transformers 5's tokenizer.json, or
        the file bpe_simple_vocab_16e6.txt.gz of openai/CLIP and open_clip, or a folder with that.

        pad  None: the folder's own, or open_clip's "!" for the .gz file, which has none
        FileNotFoundError if there is none of these, ValueError if one is damaged.
        """
        path = Path(path)
        try:
            vocab, merges, own = read_vocab(path)
            return cls(vocab, merges, pad or own or END)
        except FileNotFoundError:
            raise
        except Exception as e:  # damaged files can fail in any way
            raise ValueError(f"the tokenizer at {path} is damaged ({e}): copy it again") from e

    def save(self, folder):
        """Write the four files of a folder that transformers' CLIPTokenizer opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length,
                  "do_lower_case": True, "add_prefix_space": False, "errors": "replace", **special}
        files = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, self.merges)]) + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without start, end, padding or a limit."""
        words = split_words(clean_text(text))
        return [i for word in words for i in self.encode_word(word)]

    def encode_word(self, word: str) -> list[int]:
        if word not in self.cache:  # prompts and captions repeat their words
            symbols = spell(word)
            while len(symbols) > 1:
                pair = min(pairwise(symbols), key=lambda p: self.ranks.get(p, len(self.ranks)))
                if pair not in self.ranks:
                    break
                symbols = merge(symbols, pair)
            self.cache[word] = [self.vocab[symbol] for symbol in symbols]
        return self.cache[word]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, lower case, with one space after each word."""
        text = b""
        for i in ids:
            symbol = self.symbols[i]
            text += bytes(SYMBOL_BYTE[c] for c in symbol.removesuffix("</w>"))
            text += b" " if symbol.endswith("</w>") else b""
        return text.decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        """One text or a list of B -> ids (B, 77) of int64: start, at most 75 tokens, end, padding.
        A longer text is cut, with a warning that says what is lost."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        room = self.length - 2
        out = torch.full((len(texts), self.length), self.vocab[self.pad])
        for row, text in zip(out, texts):
            ids = self.encode(text)
            if len(ids) > room:
                warnings.warn(f"the prompt has {len(ids)} tokens, and without --a1111 {room} are "
                              f"read; left out: '{self.decode(ids[room:])}'", stacklevel=2)
            ids = [self.vocab[START], *ids[:room], self.vocab[END]]
            row[: len(ids)] = torch.tensor(ids)
        return out


# --------------------------------------------------------------------------------------------------
# Configurations. SD 2 reads 23 of 24 layers. XL's clip-vit-l has skip_last=1, final_norm=False.

CONFIGS = {
    "clip-vit-l": TextConfig(),  # SD 1.x
    "openclip-vit-h": TextConfig(width=1024, layers=23, heads=16, mlp_width=4096,
                                 activation="gelu"),
    "openclip-bigg": TextConfig(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu",
                                skip_last=1, final_norm=False, projection=1280),  # SDXL's second
    "toy": TextConfig(vocab_size=1024, width=128, layers=2, heads=4, mlp_width=512, eos=1023),
}
