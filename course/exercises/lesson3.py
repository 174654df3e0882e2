"""Lesson 3: text. Write here, and run: python -m course 3"""

import torch

# Predict, then run. "a red ball on snow at night" becomes "a red ball on sand at night". Of the 77 vectors that the
# text encoder makes, counted from 0, which is the first that changes? Each of these words is one token.
PREDICT_FIRST_CHANGED = None


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Byte-pair encoding: every place where the pair stands becomes one symbol, from left to right.

    ["c", "a", "t</w>"], ("c", "a") -> ["ca", "t</w>"]
    """
    ...


def causal_mask(L: int) -> torch.Tensor:
    """-> (L, L) bool: True in row i, column j, where token i may look at token j: itself, and those before it"""
    ...


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, where the mask allows it. Do it with matrix products and softmax.

    q (B, heads, N, d); k, v (B, heads, L, d); mask (N, L) bool, True = may look -> (B, heads, N, d)
    """
    ...


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, w: float) -> torch.Tensor:
    """Classifier-free guidance: w = 0 is without words, w = 1 the prompt alone, more is more than the prompt.

    both (B, C, h, w) -> (B, C, h, w)
    """
    ...


def denoise_guided(unet, z, t, context, empty, w: float) -> torch.Tensor:
    """The same, with one call of the network for both: a batch of twice the size.

    unet            (z, t, context) -> output like z
    z (B, C, h, w), t (B,)
    context, empty  (B, L, D), of the prompt and of no words
      ->            (B, C, h, w)
    """
    ...
