"""BLIP-base's captioner: a vision transformer reads a picture, a text decoder writes what is in it. Li et al. 2022,
arXiv 2201.12086, section 3.1.

    model = published.load("blip", "weights/blip-image-captioning-base/model.safetensors")
    tokenizer = Tokenizer.load("weights/blip-image-captioning-base")
    words = caption(model, tokenizer, x)          x (B, 3, H, W) in [-1, 1]  ->  ["two cats on a couch"]

Attribute names are Hugging Face's key names. The release's defaults are kept: the caption goes on from "a picture of",
has 5 to 20 tokens with these, and is the best that a search with three beams finds.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

PROMPT = "a picture of"
START, END = 30522, 102  # the ids of [DEC], which BLIP has added to BERT's vocabulary, and of [SEP]
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pictures


@dataclass(frozen=True)
class BLIPConfig:
    """Of blip-image-captioning-base. Heads are 64 wide in both networks."""

    width: int = 768
    layers: int = 12  # of the picture's transformer
    side: int = 384  # pixels
    patch: int = 16
    vocab_size: int = 30524
    text_layers: int = 12
    length: int = 512


def normalise(x, side):
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 3, side, side) as BLIP and CLIP read them. The aspect is lost."""
    x = F.interpolate(x.float() / 2 + 0.5, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, DEVIATION))
    return (x - mean) / deviation


def attend(q, k, v, causal=False):
    """q (B, L, D), k and v (B, N, D) -> (B, L, D), by heads of 64"""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------------------------
# The picture


class ImageLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "projection": nn.Linear(width, width)})
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        qkv = self.self_attn.qkv(self.layer_norm1(x)).chunk(3, -1)
        x = x + self.self_attn.projection(attend(*qkv))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x))))


class ImageEncoder(nn.Module):
    """ViT-B/16"""

    def __init__(self, c):
        super().__init__()
        m = self.embeddings = nn.Module()
        m.class_embedding = nn.Parameter(torch.zeros(1, 1, c.width))
        m.patch_embedding = nn.Conv2d(3, c.width, c.patch, c.patch)
        m.position_embedding = nn.Parameter(torch.zeros(1, (c.side // c.patch) ** 2 + 1, c.width))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ImageLayer(c.width) for _ in range(c.layers))})
        self.post_layernorm = nn.LayerNorm(c.width)

    def forward(self, x):
        """x (B, 3, side, side), of `normalise` -> (B, 1 + patches, width)"""
        m = self.embeddings
        x = m.patch_embedding(x).flatten(2).mT
        x = torch.cat([m.class_embedding.expand(len(x), -1, -1), x], 1) + m.position_embedding
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The words: BERT, with attention to the picture in every layer


def output_layer(c_in, width):
    return nn.ModuleDict({"dense": nn.Linear(c_in, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})


class TextAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self = nn.ModuleDict({n: nn.Linear(width, width) for n in ("query", "key", "value")})
        self.output = output_layer(width, width)

    def forward(self, x, context, causal):
        """x (B, L, D), context (B, N, D) -> (B, L, D)"""
        seen = attend(self.self.query(x), self.self.key(context), self.self.value(context), causal)
        return self.output.LayerNorm(x + self.output.dense(seen))


class TextLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = TextAttention(width)
        self.crossattention = TextAttention(width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = output_layer(4 * width, width)

    def forward(self, x, picture):
        x = self.attention(x, x, causal=True)
        x = self.crossattention(x, picture, causal=False)
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class TextDecoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        m = self.bert = nn.Module()
        m.embeddings = nn.Module()
        m.embeddings.word_embeddings = nn.Embedding(c.vocab_size, c.width)
        m.embeddings.position_embeddings = nn.Embedding(c.length, c.width)
        m.embeddings.LayerNorm = nn.LayerNorm(c.width, eps=1e-12)
        m.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(c.width) for _ in range(c.text_layers))})
        self.cls = nn.Module()
        self.cls.predictions = nn.Module()
        self.cls.predictions.bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.cls.predictions.transform = output_layer(c.width, c.width)

    def forward(self, ids, picture):
        """ids (B, L), picture (B, N, D) -> logits of the next token after each (B, L, vocab_size)"""
        m = self.bert.embeddings
        x = m.LayerNorm(m.word_embeddings(ids) + m.position_embeddings.weight[: ids.shape[1]])
        for layer in self.bert.encoder.layer:
            x = layer(x, picture)
        head = self.cls.predictions
        x = head.transform.LayerNorm(F.gelu(head.transform.dense(x)))
        return F.linear(x, m.word_embeddings.weight, head.bias)  # words are read and written by the same weights


class BLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = ImageEncoder(config)
        self.text_decoder = TextDecoder(config)


def config_from_shapes(shapes):
    """{name: shape} -> BLIPConfig"""
    image, text = "vision_model.encoder.layers.", "text_decoder.bert."
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    places = shapes["vision_model.embeddings.position_embedding"][1] - 1
    counts = [len({name.split(".")[i] for name in shapes if name.startswith(start)})
              for start, i in ((image, 3), (text + "encoder.layer.", 4))]
    if width % 64:
        raise ValueError(f"heads of 64 do not share a width of {width}")
    return BLIPConfig(width, counts[0], patch * round(places**0.5), patch,
                      shapes[text + "embeddings.word_embeddings.weight"][0], counts[1],
                      shapes[text + "embeddings.position_embeddings.weight"][0])


def rename(name):
    """A name in the file -> the model's; None for what repeats another tensor, or counts places"""
    return None if re.search(r"predictions\.decoder\.|position_ids", name) else name


# ---------------------------------------------------------------------------------------------------------------------
# Captions


@torch.no_grad()
def search(model, picture, ids, beams=3, least=5, most=20):
    """The likeliest continuation of ids [L] before a picture's states (1, N, D) -> ids, without the end

    Beams are compared by their mean log-probability per token. beams=1 is greedy.
    """
    live, scores, ended = torch.tensor([ids], device=picture.device), torch.zeros(1, device=picture.device), []
    while live.shape[1] < most:
        logits = model.text_decoder(live, picture.expand(len(live), -1, -1))[:, -1].float()
        logprobs = logits.log_softmax(-1)
        if live.shape[1] < least:
            logprobs[:, END] = -torch.inf
        # Twice as many as there are beams: as many may end, and as many go on.
        best, which = (scores[:, None] + logprobs).flatten().topk(2 * beams)
        parents, tokens = which // logprobs.shape[1], which % logprobs.shape[1]
        length = live.shape[1]
        for rank in (tokens[:beams] == END).nonzero()[:, 0].tolist():
            ended.append((best[rank].item() / (length + 1 - len(ids)), live[parents[rank]].tolist()))
        on = (tokens != END).nonzero()[:beams, 0]
        live, scores = torch.cat([live[parents[on]], tokens[on, None]], 1), best[on]
        # No beam that goes on is better than those that have ended.
        ended = sorted(ended, key=lambda e: -e[0])[:beams]
        if len(ended) == beams and scores[0] / (live.shape[1] - len(ids)) <= ended[-1][0]:
            break
    else:
        ended += [(s / (live.shape[1] - len(ids)), x) for s, x in zip(scores.tolist(), live.tolist())]
    return max(ended, key=lambda e: e[0])[1]


@torch.no_grad()
def caption(model, tokenizer, x, prompt=PROMPT, **options):
    """Pictures (B, 3, H, W) in [-1, 1] -> [what is in them, without the prompt]. options: of `search`"""
    like = model.text_decoder.cls.predictions.bias
    pictures = model.vision_model(normalise(x.to(like.device), model.config.side).to(like))
    start = [START, *tokenizer.encode(prompt)]
    return [tokenizer.decode(search(model, one[None], start, **options)[len(start):]) for one in pictures]


class Tokenizer:
    """WordPiece (Schuster & Nakajima 2012), as BERT has it: lower case, no accents, the longest known pieces first."""

    def __init__(self, pieces):
        """pieces  {text: id}; "##" begins those that go on within a word. ValueError: it lacks the unknown word's."""
        if "[UNK]" not in pieces:
            raise ValueError("the vocabulary has no '[UNK]'")
        self.pieces, self.texts = pieces, {i: text for text, i in pieces.items()}

    @classmethod
    def load(cls, folder):
        """A folder with vocab.txt or tokenizer.json. FileNotFoundError if neither is there, ValueError if damaged."""
        plain, whole = Path(folder) / "vocab.txt", Path(folder) / "tokenizer.json"
        try:
            if plain.is_file():
                lines = plain.read_text(encoding="utf-8").splitlines()
                return cls({line: i for i, line in enumerate(lines)})
            return cls(json.loads(whole.read_text(encoding="utf-8"))["model"]["vocab"])
        except FileNotFoundError:
            raise FileNotFoundError(f"BLIP needs vocab.txt or tokenizer.json in {folder}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"the tokenizer in {folder} is damaged ({e}): copy it again") from None

    def encode(self, text):
        """-> ids, without start and end"""
        text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        ids = []
        for word in re.findall(r"\w+|[^\w\s]", text.replace("_", " _ ")):
            found, begin = [], 0
            while begin < len(word):
                ends = (end for end in range(len(word), begin, -1) if self.piece(word, begin, end) in self.pieces)
                if (end := next(ends, None)) is None:
                    found, begin = ["[UNK]"], len(word)
                else:
                    found, begin = [*found, self.piece(word, begin, end)], end
            ids += [self.pieces[piece] for piece in found]
        return ids

    def piece(self, word, begin, end):
        return ("##" if begin else "") + word[begin:end]

    def decode(self, ids):
        """-> text, without special tokens"""
        words = [self.texts.get(i, "") for i in ids]
        text = " ".join(w for w in words if w and not re.fullmatch(r"\[\w+\]", w)).replace(" ##", "")
        return re.sub(r" ([.,!?])", r"\1", text).replace(" ' ", "'")
