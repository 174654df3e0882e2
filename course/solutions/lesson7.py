"""Lesson 7, solved."""

import math

import torch
import torch.nn.functional as F

PREDICT_PICTURES = (50, 10)  # what the extractor sees depends on the step, but neither on the seed nor on x_t


def extractor_input(I, noise, M, abar):
    I_t = math.sqrt(abar) * I + math.sqrt(1 - abar) * noise
    return torch.cat([I_t, I, M], dim=1)


def cross_reference(block, x, f):
    attention = block.attn2
    queries = attention.to_q(block.norm2(x))
    keys, values = attention.to_k(f), attention.to_v(f)
    weights = F.softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), dim=-1)  # (B, N, N)
    return x + attention.to_out[0](weights @ values)


def start_latent(coarse, epsilon, schedule, timesteps):
    abar = schedule.abar[timesteps[0]]
    return math.sqrt(abar) * coarse + math.sqrt(1 - abar) * epsilon


def v_loss(output, x_0, noise, alpha, sigma):
    return (output - (alpha * noise - sigma * x_0)).square().mean()


def drop_coarse(batch, dropped):
    known = (~dropped).float()[:, None, None, None]
    return batch["reference"], known * batch["coarse"], known * batch["mask"]
