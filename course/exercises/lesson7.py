"""Lesson 7: Magic Fixup. Write here, and run: python -m course 7

Latents are (B, C, h, w): C = 8 in the toy, 4 in Stable Diffusion. M is (B, 1, h, w): 1 where content survived the edit.
"""

import torch  # noqa: F401, for your use
import torch.nn.functional as F  # noqa: F401

# Predict, then run. Five versions of one edit (five seeds), ten steps each. How many pictures does the synthesizer see
# in all, and how many does the detail extractor see? (synthesizer, extractor)
PREDICT_PICTURES = None


def extractor_input(I, noise, M, abar):
    """Equation 2, and what the detail extractor is shown at noise level abar: three things, one after another.

    The noised reference, the reference itself, the mask. The paper prints (1 - abar) before the noise. What does the
    forward process of DDPM have there?

    I, noise (B, C, h, w), M (B, 1, h, w), abar a number -> (B, 2 C + 1, h, w)
    """
    ...


def cross_reference(block, x, f):
    """Figure 3, right: the second attention of a block of the synthesizer, which looks up what the extractor has seen.

    block  a unet.TransformerBlock; of it norm2 and attn2 are used: norm2(..), attn2.to_q(..), attn2.to_k(..),
           attn2.to_v(..), attn2.to_out[0](..). Take it as an attention with ONE head
    x      (B, N, width), the synthesizer's tokens after their self-attention
    f      (B, N, width), the extractor's tokens at the same block, as `UNet.features` gives them: norm1 is done
      ->   (B, N, width): x, and what was looked up added to it
    """
    ...


def start_latent(coarse, epsilon, schedule, timesteps):
    """Equation 4, its square root restored: where sampling starts.

    coarse, epsilon (B, C, h, w); schedule.abar[t] for t in 0 .. 999; timesteps, those that the sampler will visit, in
    its order: 981, 961, .., 1 -> x_T (B, C, h, w)
    """
    ...


def v_loss(output, x_0, noise, alpha, sigma):
    """The toy's loss: the mean squared error of the predicted v = alpha noise - sigma x_0.

    output, x_0, noise (B, C, h, w); alpha, sigma (B, 1, 1, 1) -> a number
    """
    ...


def drop_coarse(batch, dropped):
    """A fifth of the training samples are not shown the edit. What do the two networks get of these?

    batch    {"reference", "coarse" (B, C, h, w), "mask" (B, 1, h, w)}
    dropped  (B,) bool
      ->     reference, coarse, mask: for the samples that are dropped, zeros in place of coarse and mask
    """
    ...
