"""Scenes of the toy world in motion: what moves as a rigid thing does, with its exact flow, and clips in which things
turn, bend, bounce and open, and lens and light change, as in videos.

    a, b = scenes, move(scenes, velocity, camera_velocity, 1.0)
    flow_between(a, b, render(a))                     exact optical flow
    clip = Clip(n, generator); clip(0.5)              the n scenes half-way through their clips
"""

import math
from dataclasses import replace

import torch

from toy.world import find_objects, project, random_scenes, to_object


def move(scenes, velocity, camera_velocity, time):
    """The scenes `time` later. velocity (B, K, 2), camera_velocity (B, 2): world x and z"""
    x, z = scenes.x + time * velocity[..., 0], scenes.z + time * velocity[..., 1]
    return replace(scenes, x=x, z=z, camera=scenes.camera + time * camera_velocity)


def flow_between(a, b, frames):
    """Exact optical flow from scenes `a` to `b`, the same scenes moved; frames: `render(a)`.

      ->  (B, 2, H, W) in pixels, x before y: where the *surface* seen at each pixel of `a` is in
          `b`, hidden there or not. The sky is infinitely far; shadows and reflections count as
          ground. NaN where it is behind the camera.
    """
    size = frames.image.shape[-1]
    px = (torch.arange(size) + 0.5) / size
    x, y = px[None, None, :], px[None, :, None]

    # The ground and the sky.
    z_a = 1 / (y - a.horizon[:, None, None]).clamp(min=1e-6)
    shift_x, shift_z = ((s - t)[:, None, None] for s, t in zip(a.camera.T, b.camera.T))
    z_b = z_a + shift_z
    ahead = torch.where(z_b > 0, z_b, torch.nan)
    to_x = 0.5 + ((x - 0.5) * z_a + shift_x) / ahead  # (B, H, W)
    to_y = (b.horizon[:, None, None] + 1 / ahead).expand(-1, -1, size)
    sky = (y <= a.horizon[:, None, None]).expand_as(to_x)
    to_x, to_y = torch.where(sky, x, to_x), torch.where(sky, y, to_y)

    # The objects: a point of the figure stays where it is on the figure.
    for slot in range(a.kind.shape[1]):
        i, k = find_objects(a, torch.full((len(a),), slot))
        u, v, _ = to_object(a, i, k, x, y)
        foot_x, foot_y, scale = project(b, i, k)
        here = frames.segments[i] == slot + 1
        to_x[i] = torch.where(here, foot_x + u * scale, to_x[i])
        to_y[i] = torch.where(here, foot_y - v * scale, to_y[i])
    return torch.stack([to_x - x, to_y - y], 1) * size


class Clip:
    """n clips, as functions of the time in 0 .. 1: scenes of the toy world in which things move as in a video."""

    def __init__(self, n, generator):
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(*shape, generator=generator)

        def some(share, *shape):
            return (torch.rand(*shape, generator=generator) < share).float()

        self.scenes = s = random_scenes(n, generator)
        K = s.x.shape[1]
        # Most cameras stand still, so that what moves is an object, as when a user edits.
        moving = some(0.4, n)
        walks = some(0.7, n, K)
        walks[:, 0] = torch.maximum(walks[:, 0], 1 - moving)
        z = (s.z * uniform(-0.5, 0.5, n, K).exp()).clamp(2.0, 5.2)
        self.to = torch.stack([(uniform(-0.1, 1.1, n, K) - 0.5) * z, z], -1)  # world x, z at the end
        self.to = torch.lerp(torch.stack([s.x, s.z], -1), self.to, walks[..., None])
        self.camera = torch.stack([uniform(-0.5, 0.5, n), uniform(-0.3, 0.3, n)], 1) * (moving * some(0.6, n))[:, None]
        self.zoom = uniform(-0.3, 0.3, n) * moving * some(0.4, n)
        self.pan = uniform(-0.15, 0.15, n, 2) * torch.tensor([1.0, 0.3]) * (moving * some(0.4, n))[:, None]
        self.sun = uniform(-0.5, 0.5, n) * some(0.2, n)
        self.aperture, self.focus = uniform(0.02, 0.1, n) * some(0.2, n), uniform(0.2, 0.5, n)
        self.turn = uniform(-2.5, 2.5, n, K) * some(0.5, n, K)
        self.start = uniform(-math.pi, math.pi, n, K) * some(0.5, n, K)
        self.grow = uniform(-0.3, 0.3, n, K) * some(0.3, n, K)
        # What goes to and fro: how far, how often, from where in the swing
        self.lean = uniform(0.05, 0.3, n, K) * some(0.3, n, K)
        self.spread = uniform(0.05, 0.3, n, K) * some(0.3, n, K)
        self.lift = uniform(0.1, 0.5, n, K) * some(0.3, n, K)
        self.often, self.phase = uniform(0.5, 2.0, n, K), uniform(0, 2 * math.pi, n, K)

    def __call__(self, time):
        """-> the scenes (n) at this time"""
        s = self.scenes
        swing = (2 * math.pi * self.often * time + self.phase).sin()
        place = torch.lerp(torch.stack([s.x, s.z], -1), self.to, time)
        sun = s.sun + time * self.sun
        near_side = sun.cos().sign() * sun.cos().abs().clamp(min=0.42)  # no shadow is infinitely thin
        return replace(
            s, x=place[..., 0], z=place[..., 1], camera=time * self.camera, zoom=time * self.zoom, pan=time * self.pan,
            sun=torch.atan2(sun.sin(), near_side), size=s.size * (time * self.grow).exp(), aperture=self.aperture,
            focus=self.focus, turn=self.start + time * self.turn, lean=self.lean * swing, spread=self.spread * swing,
            lift=self.lift * swing.abs(),
        )
