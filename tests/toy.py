"""The toy world, for the tests of it and of what is made with it."""

import torch

from toy.world import COLOURS, GROUNDS, KINDS, TIMES, Scene


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def scene(ground="sand", time="noon", sun=0.6, kind=("ball",), colour=("red",), x=(0.0,), z=(3.0,), size=(0.8,),
          **more):
    """One scene by the names of what is in it; more: a pose of its objects or the lens, e.g. turn=0.3"""
    for_all = {"zoom", "pan", "aperture", "focus"}
    more = {name: torch.tensor([value] if name in for_all else [[value]]) for name, value in more.items()}
    return Scene(
        ground=torch.tensor([GROUNDS.index(ground)]), time=torch.tensor([TIMES.index(time)]),
        horizon=torch.tensor([0.42]), sun=torch.tensor([sun]), texture=torch.zeros(1, 6), camera=torch.zeros(1, 2),
        kind=torch.tensor([[KINDS.index(k) if k else -1 for k in kind]]),
        colour=torch.tensor([[COLOURS.index(c) for c in colour]]),
        x=torch.tensor([x]), z=torch.tensor([z]), size=torch.tensor([size]), **more,
    )
