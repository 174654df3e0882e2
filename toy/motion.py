"""Things of the toy world in rigid motion, with their exact optical flow. toy/clips.py has the motion of videos."""

from dataclasses import replace

import torch

from toy.world import find_objects, project, to_object


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
