"""Muon: steps whose matrices are orthogonal (Jordan et al. 2024). Small networks learn in far fewer of them.

The momentum of a weight matrix is replaced by the nearest matrix whose singular values are all about one, so that no
direction of the gradient drowns in the few large ones. The toys are trained so; the paper's recipe is Adam's.
"""

import torch


def is_matrix(name, p):
    """Convolutions and linear layers; not embeddings, nor layers that are all but vectors."""
    return p.ndim >= 2 and "embedding" not in name and min(p.shape[0], p[0].numel()) > 8


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        """dtype: matrices are made orthogonal in it; bf16's rounding is harmless there, and often far quicker"""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # parameters by the shape of their matrix: they are orthogonalised together
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, parameters in alike.items():
                updates = torch.stack([self.nesterov(p, group["momentum"]).reshape(shape) for p in parameters])
                rate = group["lr"] * 0.2 * max(shape) ** 0.5  # as large a step as Adam's (Liu et al. 2025)
                for p, update in zip(parameters, orthogonalize(updates, self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.reshape(p.shape), alpha=-rate)

    def nesterov(self, p, momentum):
        """-> the gradient of p, some way towards its running average, which it joins"""
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        average = state["exp_avg"]
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonalize(x, dtype=torch.float32):
    """x (n, rows, columns) -> the same with singular values of about 1, by five steps of a Newton-Schulz iteration
    whose coefficients are Jordan's: they push small ones up fast, into about 0.7 .. 1.2."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, polynomial, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def make_optimizers(recipe, parameters, dtype=torch.float32):
    """parameters {name: p} -> [AdamW of all], or with recipe.muon [AdamW, Muon of matrices]"""
    matrices = {n: p for n, p in parameters.items() if recipe.muon and is_matrix(n, p)}
    others = [p for n, p in parameters.items() if n not in matrices]
    both = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, betas=(0.9, recipe.beta2), fused=True, **both)
    return [adam, Muon(matrices.values(), dtype=dtype, **both)] if matrices else [adam]
