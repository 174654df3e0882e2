"""The prior of Kandinsky 2.2, unCLIP's: from a text to the CLIP embedding of a picture of it. Ramesh et al. 2022, arXiv
2204.06125, section 2.2.

    z (B, D), t (B,), of a text states (B, L, D), pooled (B, D), seen (B, L)  -->  the clean embedding (B, D)

Attribute names are Hugging Face's key names.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoints.configs import refuse_other_options
from unet import Embedding, timestep_embedding


@dataclass(frozen=True)
class PriorConfig:
    """The defaults are Kandinsky 2.2's."""

    heads: int = 32
    head_width: int = 64
    layers: int = 20
    embedding: int = 1280  # D, of texts and pictures
    length: int = 77  # L, tokens of a text


class PriorBlock(nn.Module):
    """Self-attention and feed-forward layers, each of a layer norm, added to x."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = nn.ModuleDict({name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")})
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(width, width)])
        self.norm3 = nn.LayerNorm(width)
        wider = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([wider, nn.Identity(), nn.Linear(4 * width, width)])})

    def forward(self, x, mask):
        """x (B, N, width), mask (B, 1, N, N), True = looks there -> (B, N, width)"""
        h, attn = self.norm1(x), self.attn1
        qkv = (layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
        h = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        x = x + attn.to_out[0](h.transpose(1, 2).flatten(2))
        wider, _, back = self.ff.net
        return x + back(F.gelu(wider.proj(self.norm3(x))))


class Prior(nn.Module):
    """The network for a `PriorConfig`. It reads the embedding off at the place of a last token of its own."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, D = config.heads * config.head_width, config.embedding
        self.time_embedding = Embedding(width, width)
        self.proj_in = nn.Linear(D, width)
        self.embedding_proj = nn.Linear(D, width)
        self.encoder_hidden_states_proj = nn.Linear(D, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.length + 4, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(PriorBlock(width, config.heads) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, D)
        self.clip_mean = nn.Parameter(torch.zeros(1, D))  # z is (embedding - mean) / std
        self.clip_std = nn.Parameter(torch.ones(1, D))

    def forward(self, z, t, states, pooled, seen):
        """Arguments and result as above. seen: True for the tokens of the text, False for the padding"""
        time = self.time_embedding(timestep_embedding(t, self.proj_in.out_features).to(z))
        others = torch.stack([self.embedding_proj(pooled), time, self.proj_in(z)], dim=1)
        last = self.prd_embedding.expand(len(z), -1, -1)
        x = torch.cat([self.encoder_hidden_states_proj(states), others, last], dim=1)  # (B, L + 4, width)
        x = x + self.positional_embedding

        # A token looks at those before it and itself, and never at padding.
        N = x.shape[1]
        before = torch.ones(N, N, dtype=torch.bool, device=z.device).tril()
        mask = F.pad(seen, (0, 4), value=True)[:, None, None] & before
        for block in self.transformer_blocks:
            x = block(x, mask)
        return self.proj_to_clip_embeddings(self.norm_out(x[:, -1]))


def config_from_json(c):
    """The content of the config.json of diffusers' PriorTransformer -> PriorConfig"""
    refuse_other_options(c, {
        "_class_name": "PriorTransformer", "additional_embeddings": 4, "dropout": 0.0, "time_embed_act_fn": "silu",
        "norm_in_type": None, "embedding_proj_norm_type": None, "encoder_hid_proj_type": "linear",
        "added_emb_type": "prd", "time_embed_dim": None, "embedding_proj_dim": None, "clip_embed_dim": None,
    })
    return PriorConfig(c["num_attention_heads"], c["attention_head_dim"], c["num_layers"], c["embedding_dim"],
                       c.get("num_embeddings", 77))
