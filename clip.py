"""The words: CLIP's text encoder. Its byte-pair tokenizer is in tokenizer.py.

Stable Diffusion never sees a prompt, only 77 vectors that one of three text encoders makes of it. All three are the
same network at different widths: CLIP ViT-L (SD 1.x), OpenCLIP ViT-H (SD 2.x), and for SDXL ViT-L again together with
OpenCLIP bigG. CLIP is Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
The table of configurations is last.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import tokenizer

# The tokenizer has a file of its own, and is reached from here as well.
Tokenizer, learn_bpe, END, ARCHIVE = tokenizer.Tokenizer, tokenizer.learn_bpe, tokenizer.END, tokenizer.ARCHIVE


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

    @classmethod
    def from_json(cls, config: dict) -> "TextConfig":
        """Reads the config.json of a Hugging Face CLIPTextModel or CLIPTextModelWithProjection. Which layer is read
        is not in that file: SD 2 stores 23 of ViT-H's 24 layers instead. Raises ValueError if a size is missing."""
        try:
            vocab_size, eos = config["vocab_size"], config.get("eos_token_id")
            if eos in (None, 2):  # files from before 2023 say 2, which no CLIP vocabulary ever meant
                eos = _last_id(vocab_size)
            projected = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
            return cls(vocab_size=vocab_size, width=config["hidden_size"], layers=config["num_hidden_layers"],
                       heads=config["num_attention_heads"], length=config.get("max_position_embeddings", 77),
                       mlp_width=config["intermediate_size"], activation=config.get("hidden_act", "quick_gelu"),
                       eos=eos, projection=config["projection_dim"] if projected else None)
        except KeyError as missing:
            raise ValueError(f"the text encoder's config.json has no {missing}") from None

    def to_json(self) -> dict:
        """The config.json with which transformers opens these weights. It describes every stored layer; `skip_last`
        and `final_norm` belong to whoever reads the hidden states, and are not in it."""
        return {
            "architectures": ["CLIPTextModelWithProjection" if self.projection else "CLIPTextModel"],
            "model_type": "clip_text_model", "vocab_size": self.vocab_size, "hidden_size": self.width,
            "intermediate_size": self.mlp_width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "max_position_embeddings": self.length, "hidden_act": self.activation, "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0, "projection_dim": self.projection or self.width,
            "bos_token_id": self.eos - 1, "eos_token_id": self.eos, "pad_token_id": self.eos,
        }


def config_from_shapes(shapes: dict) -> TextConfig:
    """Reads the configuration off Hugging Face-named tensor shapes, for checkpoints that come without a config.json.

    shapes: tensor name -> shape. Heads are 64 wide and width 768 means quick_gelu, as in every released Stable
    Diffusion. Raises ValueError if the tensors are not a CLIP text encoder.
    """
    try:
        vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
        length = shapes["text_model.embeddings.position_embedding.weight"][0]
        mlp_width = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as missing:
        raise ValueError(f"these tensors are not a CLIP text encoder: there is no {missing}") from None
    layers = len({name.split(".")[3] for name in shapes if name.startswith("text_model.encoder.layers.")})
    return TextConfig(vocab_size, width, layers, max(1, width // 64), length, mlp_width,
                      "quick_gelu" if width == 768 else "gelu", _last_id(vocab_size),
                      projection=shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None)


def _last_id(vocab_size):
    return min(vocab_size, 49408) - 1  # learned words (textual inversion) stand behind CLIP's own 49408


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
