"""The words: CLIP's text encoder and its byte-pair tokenizer.

Stable Diffusion never sees a prompt, only 77 vectors that one of three text encoders makes of it. All three are the
same network at different widths: CLIP ViT-L (SD 1.x), OpenCLIP ViT-H (SD 2.x), and for SDXL ViT-L again together with
OpenCLIP bigG. CLIP is Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision";
byte-pair encoding is Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".

Three sections: the text encoder, cleaning and splitting text, the tokenizer. The table of configurations is last.
"""

import gzip
import html
import json
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# The text encoder


@dataclass(frozen=True)
class TextConfig:
    """The shape of a text encoder, and which of its layers the diffusion model reads. The defaults are SD 1.x."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 77
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # OpenAI's own weights; every OpenCLIP model has 'gelu'
    eos: int = 49407  # the pooled state stands at this id's first place
    skip_last: int = 0  # how many final layers the context leaves out: 1 = the penultimate layer
    final_norm: bool = True  # SD 1 and 2 put the final layer norm on the context, whichever layer it is; SDXL does not
    projection: int | None = None  # width of the projected pooled state; SDXL's second encoder has one

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"text encoder activation '{self.activation}' is none of {', '.join(ACTIVATIONS)}")
        if self.width % self.heads:
            raise ValueError(f"text encoder width {self.width} does not divide into {self.heads} heads")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # Causal, and with no padding mask: the padding tokens' vectors are part of what Stable Diffusion was fed.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]
        self.fc1 = nn.Linear(c.width, c.mlp_width)
        self.fc2 = nn.Linear(c.mlp_width, c.width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width)
        self.self_attn = Attention(c)
        self.layer_norm2 = nn.LayerNorm(c.width)
        self.mlp = MLP(c)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """CLIP's text transformer. Attribute names are the checkpoint's keys; nothing is computed at construction, so it
    can be built on the meta device and filled with `load_state_dict(assign=True)`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = nn.Module()  # containers without a forward: they only give the parameters their names
        self.text_model.embeddings = nn.Module()
        self.text_model.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.text_model.embeddings.position_embedding = nn.Embedding(config.length, config.width)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.text_model.final_layer_norm = nn.LayerNorm(config.width)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)
        # CLIP's initial scale (only the toy trains from scratch): unit-variance embeddings would drown the layers.
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)

    def forward(self, ids):
        """ids (B, L) of int64, L <= 77  ->  context (B, L, width): the layer that the diffusion model reads."""
        return self.encode(ids)[0]

    def encode(self, ids):
        """ids (B, L)  ->  context (B, L, width) and pooled (B, projection, or width without one).

        Pooled is the last layer's state at the end of the text, after the final layer norm: what CLIP compares with
        an image, and what SDXL adds to its timestep.
        """
        m = self.text_model
        x = m.embeddings.token_embedding(ids) + m.embeddings.position_embedding.weight[: ids.shape[1]]
        for i, layer in enumerate(m.encoder.layers):
            x = layer(x)
            if i == self.config.layers - 1 - self.config.skip_last:
                context = x
        x = m.final_layer_norm(x)
        end = (ids == self.config.eos).int().argmax(dim=1)  # the first one: the padding may be the same token
        pooled = x[torch.arange(len(ids), device=ids.device), end]
        if self.config.projection:
            pooled = self.text_projection(pooled)
        return m.final_layer_norm(context) if self.config.final_norm else context, pooled


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning and splitting text
#
# CLIP was trained on text cleaned by the ftfy package. `fix_text` does by hand what its defaults do, except for
# mojibake repair (guessing that a garbled word was UTF-8 read as Latin-1) and HTML entities in capitals ("&EACUTE;").

START, END = "<|startoftext|>", "<|endoftext|>"


def character_table() -> dict:
    """Single-character repairs, for str.translate."""
    nfkc = {i: unicodedata.normalize("NFKC", chr(i)) for i in range(0xFF01, 0xFFF0)}  # full- and half-width forms
    nfkc |= {ord(c): unicodedata.normalize("NFKC", c) for c in "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"}  # Latin ligatures
    quotes = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
    c1 = {i: html.unescape(f"&#{i};") for i in range(0x80, 0xA0)}  # they stand for Windows-1252: HTML has that table
    return nfkc | quotes | c1 | {0x3000: " ", ord("ﬅ"): "ſt"}


CHARACTERS = character_table()
CONTROLS = dict.fromkeys([*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF,
                          *range(0xFFF9, 0xFFFD)])


def fix_text(text: str) -> str:
    """Text -> the same text as ftfy's defaults leave it, but for the exceptions above."""
    lines, has_markup = [], False
    for line in text.split("\n"):
        has_markup = has_markup or "<" in line  # from there on, "&lt;" may well be meant literally
        before = None
        while line != before:  # one repair can uncover the next
            before = line
            if not has_markup:
                line = re.sub("&#?[0-9A-Za-z]{1,24};", lambda entity: html.unescape(entity[0]), line)
            line = line.translate(CHARACTERS)
            line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs joined, halves marked
            line = re.sub("\033\\[[0-9;]*[a-zA-Z]", "", line)  # a terminal's colours
            line = unicodedata.normalize("NFC", line.translate(CONTROLS))
        lines.append(line)
    return "\n".join(lines)


def clean_text(text: str) -> str:
    """CLIP's cleaning: repaired, HTML unescaped, white space collapsed to single spaces, lower case."""
    return " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()


SPECIAL_OR_CONTRACTION = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)
RUN = re.compile("L+|N|Z+|[^LNZ]+")


def split_words(text: str) -> list[str]:
    """Cleaned text -> words: contractions, runs of letters, single digits, runs of anything else but spaces.

    CLIP's pattern needs Unicode classes (`\\p{L}`), which `re` lacks. So write each character's class letter (L, N,
    Z for spaces, ...) into a second string of equal length, and let plain `re` find the runs in that one.
    """
    classes = "".join(unicodedata.category(c)[0] for c in text)
    words, i = [], 0
    while i < len(text):
        j = (SPECIAL_OR_CONTRACTION.match(text, i) or RUN.match(classes, i)).end()
        if classes[i] != "Z":
            words.append(text[i:j])
        i = j
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
#
# A word is spelled as its UTF-8 bytes, each byte as one printable character, and its last symbol carries "</w>".
# Then the pair of neighbours that was learned first is merged, again and again, until no learned pair is left.

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_SYMBOL = {b: chr(b) for b in PRINTABLE}
BYTE_SYMBOL |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_SYMBOL)}
SYMBOL_BYTE = {symbol: b for b, symbol in BYTE_SYMBOL.items()}
ALPHABET = [*BYTE_SYMBOL.values(), *(symbol + "</w>" for symbol in BYTE_SYMBOL.values())]  # ids 0 to 511
ARCHIVE = "bpe_simple_vocab_16e6.txt.gz"
ARCHIVE_MERGES = 49408 - 512 - 2  # the file holds many more merges than CLIP uses


def spell(word: str) -> list[str]:
    symbols = [BYTE_SYMBOL[b] for b in word.encode("utf-8")]
    symbols[-1] += "</w>"
    return symbols


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out, i = [], 0
    while i < len(symbols):
        n = 2 if tuple(symbols[i : i + 2]) == pair else 1
        out.append("".join(symbols[i : i + n]))
        i += n
    return out


def build_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Symbol -> id in CLIP's order: the alphabet, one symbol for each merge, the two special tokens."""
    symbols = dict.fromkeys([*ALPHABET, *map("".join, merges), START, END])
    return {symbol: i for i, symbol in enumerate(symbols)}


def learn_bpe(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns a byte-pair vocabulary of at most `size` symbols (fewer if every word is one symbol before that).

    Returns (vocab: symbol -> id, merges in order). The whole byte alphabet is in it, so any text can be encoded.
    Equal counts go to the alphabetically first pair: the same texts give the same vocabulary, in any order.
    Raises ValueError if size leaves no room for the alphabet and the special tokens (514).
    """
    if size < len(ALPHABET) + 2:
        raise ValueError(f"a byte-pair vocabulary needs at least {len(ALPHABET) + 2} symbols, not {size}")
    counts = Counter(word for text in texts for word in split_words(clean_text(text)) if word not in (START, END))
    words = [(spell(word), n) for word, n in counts.items()]
    known, merges = set(ALPHABET), []
    while len(known) + 2 < size:
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


class Tokenizer:
    """Text -> the ids that a CLIP text encoder reads. Ids are identical to OpenAI's, open_clip's and (for text that
    needs no cleaning) Hugging Face's."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = END, length: int = 77):
        """pad: the symbol after the end token: <|endoftext|> in SD 1 (and SDXL's first encoder), "!" (id 0) in SD 2
        (and SDXL's second). Raises ValueError if vocab and merges do not make a CLIP tokenizer."""
        missing = [s for s in (*ALPHABET, START, END, pad) if s not in vocab]
        if missing:
            raise ValueError(f"the vocabulary has no {missing[0]!r}")
        for pair in merges:
            if len(pair) != 2 or "".join(pair) not in vocab:
                raise ValueError(f"{' '.join(pair)!r} among the merges makes no symbol of the vocabulary")
        self.vocab, self.merges, self.pad, self.length = vocab, merges, pad, length
        self.symbols = {i: symbol for symbol, i in vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.cache = {START: [vocab[START]], END: [vocab[END]]}

    @classmethod
    def load(cls, path, pad: str | None = None) -> "Tokenizer":
        """path: a folder with vocab.json and merges.txt (or transformers 5's tokenizer.json), or the file
        bpe_simple_vocab_16e6.txt.gz of openai/CLIP and open_clip, or a folder with that.

        The pad symbol is the folder's own; the .gz file has none and gets open_clip's "!". `pad` overrides both.
        Raises FileNotFoundError if none of these is there, ValueError if what is there is damaged.
        """
        path = Path(path)
        archive = path / ARCHIVE if path.is_dir() else path

        def read(name):
            return (path / name).read_text(encoding="utf-8")

        try:
            if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
                vocab = json.loads(read("vocab.json"))
                merges = [line for line in read("merges.txt").split("\n") if not line.startswith("#version")]
            elif (path / "tokenizer.json").is_file():
                vocab, merges = (json.loads(read("tokenizer.json"))["model"][key] for key in ("vocab", "merges"))
            elif archive.is_file():
                merges = gzip.decompress(archive.read_bytes()).decode("utf-8").split("\n")[1 : ARCHIVE_MERGES + 1]
                vocab, pad = None, pad or "!"
                if len(merges) < ARCHIVE_MERGES:
                    raise ValueError(f"{len(merges)} of {ARCHIVE_MERGES} merges")
            else:
                raise FileNotFoundError(f"no tokenizer at {path}: it should be a folder with vocab.json and merges.txt "
                                        f"(a Stable Diffusion's tokenizer/), or the file {ARCHIVE} of openai/CLIP")
            merges = [tuple(m.split() if isinstance(m, str) else m) for m in merges if m]
            for name in ("special_tokens_map.json", "tokenizer_config.json"):  # where they differ (SD 2) the first wins
                if pad is None and (path / name).is_file():
                    pad = json.loads(read(name)).get("pad_token")
                    pad = pad["content"] if isinstance(pad, dict) else pad
            return cls(build_vocab(merges) if vocab is None else vocab, merges, pad or END)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"the tokenizer at {path} is damaged ({e}): copy its files again") from e

    def save(self, folder):
        """Writes the four files of a Hugging Face tokenizer folder; transformers' CLIPTokenizer opens it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "do_lower_case": True,
                  "add_prefix_space": False, "errors": "replace", **special}
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
        return [i for word in split_words(clean_text(text)) for i in self._encode_word(word)]

    def _encode_word(self, word):
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
        for symbol in (self.symbols[i] for i in ids):
            text += bytes(SYMBOL_BYTE[c] for c in symbol.removesuffix("</w>"))
            text += b" " if symbol.endswith("</w>") else b""
        return text.decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        """One text or a list of B  ->  ids (B, 77) of int64: start, at most 75 tokens, end, padding.

        Longer texts are cut, with a warning that says what was lost.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        room = self.length - 2
        out = torch.full((len(texts), self.length), self.vocab[self.pad])
        for row, text in zip(out, texts):
            ids = self.encode(text)
            if len(ids) > room:
                warnings.warn(f"the prompt has {len(ids)} tokens, and the text encoder reads {room}; "
                              f"left out: '{self.decode(ids[room:])}'", stacklevel=2)
            ids = [self.vocab[START], *ids[:room], self.vocab[END]]
            row[: len(ids)] = torch.tensor(ids)
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Configurations. SDXL's first encoder is `replace(CONFIGS["clip-vit-l"], skip_last=1, final_norm=False)`.

CONFIGS = {
    "clip-vit-l": TextConfig(),  # SD 1.x
    "openclip-vit-h": TextConfig(  # SD 2.x: its penultimate layer, by storing 23 of the 24
        width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu"),
    "openclip-bigg": TextConfig(  # SDXL's second
        width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", skip_last=1, final_norm=False,
        projection=1280),
    "toy": TextConfig(vocab_size=1024, width=128, layers=2, heads=4, mlp_width=512, eos=1023),
}
