"""A small procedural world that knows the truth about its own pictures.

A `Scene` is a description, not a picture: where the horizon and the sun are, what the ground is
made of, which objects stand where. `render` draws scenes with all that a photograph ties together:
perspective, occlusion, shading, shadows on the ground, reflections in water. It draws an edited
scene (an object moved, the camera shifted) as well, with its shadows and reflections.

World units: the camera stands one unit above the ground plane and looks along +z, x is to the
right, y is up. It is a pinhole with focal length 1 in units of the image's side. The ground point
(x, z) is seen at

    px = 1/2 + (x - camera_x) / (z - camera_z)    py = horizon + 1 / (z - camera_z)    in [0, 1]

Objects are flat figures facing the camera, `size` units large. Light comes from azimuth `sun`.
What an object or the lens does beside standing still is in the fields of `Scene` that are 0 by
default; toy/motion.py changes them over time.
"""

import math
from dataclasses import dataclass, fields

import torch

# --------------------------------------------------------------------------------------------------
# What there is

GROUNDS = ("grass", "sand", "snow", "water")
TIMES = ("noon", "sunset", "night")
KINDS = ("ball", "box", "cone", "tree", "house", "mushroom")  # a new kind comes last
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")

#                     colour               texture: frequency in x, in z, amplitude
GROUND = torch.tensor([[0.36, 0.55, 0.18, 5.0, 4.0, 0.10],
                       [0.84, 0.74, 0.50, 1.5, 7.0, 0.06],
                       [0.90, 0.93, 0.97, 1.2, 1.5, 0.03],
                       [0.16, 0.42, 0.58, 1.0, 9.0, 0.09]])
#                   tint of the light   sky at the top      at the horizon      direct, shadow
TIME = torch.tensor([[1.00, 1.00, 1.00,   0.30, 0.55, 0.90,   0.75, 0.87, 0.97,   0.50, 0.7],
                     [0.98, 0.72, 0.58,   0.42, 0.30, 0.50,   1.00, 0.66, 0.36,   0.45, 1.3],
                     [0.40, 0.46, 0.70,   0.03, 0.04, 0.14,   0.13, 0.16, 0.32,   0.40, 0.9]])
COLOUR = torch.tensor([[0.86, 0.13, 0.10], [0.96, 0.80, 0.12], [0.12, 0.62, 0.25],
                       [0.14, 0.30, 0.90], [0.55, 0.18, 0.72], [0.95, 0.95, 0.95]])
OWN, BROWN, DARK, PALE = range(4)  # a part has the object's colour, or one of these
FIXED = torch.tensor([[0.0, 0.0, 0.0], [0.42, 0.27, 0.14], [0.28, 0.20, 0.18], [0.90, 0.86, 0.76]])
# An ellipse; a trapezoid shaded like a cone; a trapezoid shaded like a box seen on its edge
ROUND, TURNED, FACETED = range(3)
YAW = 0.4  # radians: how far a box-like thing is turned away, where `turn` is 0
CASTS, INSIDE = 1, 0  # a part casts a shadow, or lies inside the outline of the parts that do
# Parts from back to front: shape, centre u, v, half width, half height, taper (the top's width is
# 1 - taper of the bottom's), colour, CASTS or INSIDE. u to the right, v up from the foot, in sizes
PARTS = {
    "ball": [(ROUND, 0.0, 0.50, 0.50, 0.50, 0.0, OWN, CASTS)],
    "box": [(FACETED, 0.0, 0.42, 0.45, 0.42, 0.0, OWN, CASTS)],
    "cone": [(TURNED, 0.0, 0.58, 0.48, 0.58, 0.95, OWN, CASTS)],
    "tree": [(TURNED, 0.0, 0.25, 0.09, 0.26, 0.2, BROWN, CASTS),
             (ROUND, 0.0, 0.92, 0.45, 0.50, 0.0, OWN, CASTS)],
    "house": [(FACETED, 0.0, 0.34, 0.52, 0.34, 0.0, OWN, CASTS),
              (FACETED, 0.0, 0.90, 0.64, 0.24, 0.8, DARK, CASTS),
              (TURNED, -0.14, 0.20, 0.11, 0.20, 0.0, DARK, INSIDE)],  # the door
    "mushroom": [(TURNED, 0.0, 0.30, 0.15, 0.30, 0.2, PALE, CASTS),
                 (ROUND, 0.0, 0.64, 0.52, 0.28, 0.0, OWN, CASTS)],
}


def pack_parts(parts):
    """{kind: [part]} -> (kinds, most parts, 8), in the order of KINDS; shape -1 = no part"""
    most, none = max(map(len, parts.values())), (-1, *[0] * 7)
    return torch.tensor([(parts[k] + most * [none])[:most] for k in KINDS], dtype=torch.float)


PART = pack_parts(PARTS)


POSE = ("turn", "lean", "spread", "lift")  # of an object, beside where and how large it is


@dataclass
class Scene:
    """B scenes with room for K objects each, as tensors on the CPU. Edit any field and render."""

    ground: torch.Tensor  # (B,) index into GROUNDS
    time: torch.Tensor  # (B,) index into TIMES
    horizon: torch.Tensor  # (B,) height of the horizon, 0 = the picture's top, 1 = its bottom
    sun: torch.Tensor  # (B,) azimuth of the light, radians: 0 = straight ahead, pi/2 = at the right
    texture: torch.Tensor  # (B, 6) phases of ground, clouds and hills, in radians
    camera: torch.Tensor  # (B, 2) x and z
    kind: torch.Tensor  # (B, K) index into KINDS, -1 where there is no object
    colour: torch.Tensor  # (B, K) index into COLOURS
    x: torch.Tensor  # (B, K) world
    z: torch.Tensor  # (B, K) world
    size: torch.Tensor  # (B, K) world
    # An object's pose
    turn: torch.Tensor = None  # (B, K) about the vertical axis, radians: box-like things have sides
    lean: torch.Tensor = None  # (B, K) a figure bends aside by lean * v^2, in sizes
    spread: torch.Tensor = None  # (B, K) round parts open: wider by 1 + spread, lower by as much
    lift: torch.Tensor = None  # (B, K) height of the foot above the ground, world
    # The lens: a place p of the picture is seen at 1/2 + e^zoom * (p - pan - 1/2)
    zoom: torch.Tensor = None  # (B,)
    pan: torch.Tensor = None  # (B, 2) x, y
    aperture: torch.Tensor = None  # (B,) blur, of the picture's side, per |1 / z - focus|
    focus: torch.Tensor = None  # (B,) 1 / the distance that is sharp

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is None:
                like = dict(zoom=self.sun, pan=self.camera, aperture=self.sun, focus=self.sun)
                setattr(self, field.name, torch.zeros_like(like.get(field.name, self.x)))

    def __len__(self):
        return len(self.ground)

    def __getitem__(self, index):
        """The scenes at `index` (a slice, a list or a tensor), as a Scene."""
        return Scene(*(getattr(self, f.name)[index] for f in fields(self)))


# --------------------------------------------------------------------------------------------------
# Random scenes and their captions


def random_scenes(n, generator=None, objects=3, kinds=6):
    """n scenes with 1 to `objects` objects that stand apart. Same generator state, same scenes.

    kinds  objects are of the first so many KINDS. A kind that is appended there changes no scene
           of those that were drawn before: ask for it by kinds=7
    """

    def uniform(lo, hi, *shape):
        return lo + (hi - lo) * torch.rand(*shape, generator=generator)

    def choice(options, *shape):
        return torch.randint(options, shape, generator=generator)

    horizon = uniform(0.36, 0.48, n)
    # A light near the picture plane would cast an infinitely thin shadow: 25 degrees are between.
    sun = uniform(-1.1, 1.1, n) + math.pi * choice(2, n)
    share = torch.tensor([0.5, 0.35, 0.15][:objects])  # of scenes with 1, 2, 3 objects
    more = torch.multinomial(share, n, replacement=True, generator=generator)  # than one object
    there = torch.arange(objects) <= more[:, None]  # (n, objects)
    kind = choice(kinds, n, objects).where(there, torch.tensor(-1))

    # Each object has a column of the picture: they overlap at times, but never hide each other.
    slot = uniform(0, 1, n, objects).masked_fill(~there, 9.0).argsort(1).argsort(1)
    width = 1.0 / (more[:, None] + 1)
    px = (slot + 0.5) * width + uniform(-0.28, 0.28, n, objects) * width
    z = uniform(2.1, 4.6, n, objects)
    return Scene(
        ground=choice(len(GROUNDS), n), time=choice(len(TIMES), n), horizon=horizon, sun=sun,
        texture=uniform(0, 6.28, n, 6), camera=torch.zeros(n, 2),
        kind=kind, colour=choice(len(COLOURS), n, objects),
        x=(px - 0.5) * 0.9 * z, z=z, size=uniform(0.62, 0.95, n, objects),
    )


def captions(scenes, generator=None):
    """-> [a caption of each scene]. As people do, some leave objects or the time out."""

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def caption(i):
        order = scenes.x[i].argsort().tolist()  # as people read: from left to right
        order = [k for k in order if scenes.kind[i, k] >= 0]
        things = [f"a {COLOURS[scenes.colour[i, k]]} {KINDS[scenes.kind[i, k]]}" for k in order]
        things = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
        ground, time = GROUNDS[scenes.ground[i]], TIMES[scenes.time[i]]
        where = f"{pick('on', 'on', 'on the')} {ground}"
        return pick(
            *4 * [f"{things} {where} at {time}"], f"a photo of {things} {where} at {time}",
            f"at {time}, {things} {where}", f"{things}, {ground}, {time}", f"{ground} at {time}",
            f"{things} {where}", f"{things} at {time}",
        )

    return [caption(i) for i in range(len(scenes))]


# --------------------------------------------------------------------------------------------------
# Drawing


@dataclass
class Frames:
    """What the camera sees."""

    image: torch.Tensor  # (B, 3, H, W) in [0, 1]
    segments: torch.Tensor  # (B, H, W) uint8: 0 = background, k + 1 = object k
    depth: torch.Tensor  # (B, H, W) distance z from the camera, inf in the sky


def render(scenes, size=128):
    """Draw the scenes at `size` x `size` pixels. -> Frames"""
    B = len(scenes)
    px = (torch.arange(size) + 0.5) / size
    zoom, pan_x, pan_y = (s[:, None, None] for s in (scenes.zoom.exp(), *scenes.pan.T))
    # (B, 1, W), (B, H, 1): broadcast, not stored
    x = (px[None, None, :] - 0.5) / zoom + 0.5 + pan_x
    y = (px[None, :, None] - 0.5) / zoom + 0.5 + pan_y
    pixel = 1 / (size * zoom)

    # The ground, as a plane: what each pixel sees of it, and how far away.
    horizon, cam_x, cam_z = (s[:, None, None] for s in (scenes.horizon, *scenes.camera.T))
    z = 1 / (y - horizon).clamp(min=1e-3)  # (B, H, 1) distance of the ground seen in this row
    ground = (cam_x + (x - 0.5) * z, cam_z + z)  # its world x (B, H, W) and z (B, H, 1)
    below = ((y - horizon) / pixel + 0.5).clamp(0, 1)  # (B, H, 1) coverage by the ground plane
    sky, haze = draw_sky(scenes, x, y, pixel)
    land = draw_ground(scenes, ground, z, haze)

    # What the ground shows of the objects.
    back_to_front = [find_objects(scenes, slot) for slot in scenes.z.argsort(1, descending=True).T]
    for i, k in back_to_front:
        wet = scenes.ground[i] == GROUNDS.index("water")
        cast_shadows(scenes, i[~wet], k[~wet], ground, land)
        reflect(scenes, i[wet], k[wet], x, y, ground, land, pixel)
    image = torch.lerp(sky, land, below[:, None])

    # The objects.
    segments = torch.zeros(B, size, size, dtype=torch.uint8)
    depth = torch.where(y > horizon, z, torch.inf).expand(B, size, size).clone()
    for i, k in back_to_front:
        u, v, scale = to_object(scenes, i, k, x[i], y[i])
        distance = scenes.z[i, k] - scenes.camera[i, 1]
        soft = (pixel[i] + out_of_focus(scenes, i, distance[:, None, None])) / scale
        image[i], alpha = paint(scenes, i, k, u, v, image[i], soft)
        body = alpha > 0.5
        segments[i] = torch.where(body, (k + 1).to(torch.uint8)[:, None, None], segments[i])
        depth[i] = torch.where(body, distance[:, None, None], depth[i])
    return Frames(image.clamp_(0, 1), segments, depth)


def find_objects(scenes, slot):
    """The scenes (n,) that have an object number `slot` (B,), and these numbers (n,)."""
    i = (scenes.kind[torch.arange(len(slot)), slot] >= 0).nonzero()[:, 0]
    return i, slot[i]


def project(scenes, i, k):
    """Object k of scene i in the picture: its foot's x, y in 0 .. 1, its size; (n, 1, 1) each"""
    distance = scenes.z[i, k] - scenes.camera[i, 1]
    foot_x = 0.5 + (scenes.x[i, k] - scenes.camera[i, 0]) / distance
    foot_y = scenes.horizon[i] + 1 / distance
    scale = scenes.size[i, k] / distance
    return foot_x[:, None, None], foot_y[:, None, None], scale[:, None, None]


def to_object(scenes, i, k, x, y):
    """Pixels as the object's u (n, 1, W) to the right, v (n, H, 1) up from its foot, in sizes"""
    foot_x, foot_y, scale = project(scenes, i, k)
    return (x - foot_x) / scale, (foot_y - y) / scale, scale  # and a size in the picture


def out_of_focus(scenes, i, distance):
    """How far a point at `distance` (n, 1, 1) or (n, H, 1) is blurred, of the picture's side"""
    aperture, focus = scenes.aperture[i, None, None], scenes.focus[i, None, None]
    return aperture * (1 / distance - focus).abs()


def pose(scenes, i, k, p, u, v):
    """Part p of the objects that have one, as they hold it. u (n, 1 or H, W), v (n, H, 1 or W): in
    sizes above the ground -> which (m,) objects; their parts (m, 8); u, v, as the part is at rest"""
    part = PART[scenes.kind[i, k], p]
    j = (part[:, 0] >= 0).nonzero()[:, 0]
    part, i, k = part[j].clone(), i[j], k[j]
    lean, lift = (s[i, k][:, None, None] for s in (scenes.lean, scenes.lift / scenes.size))
    v = v[j] - lift
    u = u[j] - lean * v.clamp(min=0) ** 2

    # A box is as wide as its two sides, seen aslant. What lies on a side goes round with it.
    turned = YAW + scenes.turn[i, k]
    wide = sides(turned).sum(0) / (math.cos(YAW) + math.sin(YAW))
    box, on_side = part[:, 0] == FACETED, part[:, 7] == INSIDE
    part[:, 3] *= torch.where(box, wide, 1.0)
    part[:, 3] *= torch.where(on_side, turned.cos().clamp(min=0) / math.cos(YAW), 1.0)
    part[:, 1] *= torch.where(on_side, turned.sin() / math.sin(YAW), 1.0)
    open_ = torch.where(part[:, 0] == ROUND, 1 + scenes.spread[i, k], 1.0)
    part[:, 3] *= open_
    part[:, 4] /= open_
    return j, part, u, v


def sides(turned):
    """-> how wide the left and the right side of something square are seen, (2, n)"""
    angle = turned.remainder(math.pi / 2)
    return torch.stack([angle.cos(), angle.sin()])


def cover_part(part, u, v, soft):
    """One part (n, 8) per object, its edge `soft` sizes wide -> coverage in [0, 1], and a pixel's
    place in half widths and half heights; (n, H, W) each"""
    shape, cu, cv, w, h, taper = (part[:, j, None, None] for j in range(6))
    du, dv = u - cu, (v - cv) / h
    w = w * (1 - taper * (dv.clamp(-1, 1) + 1) / 2)
    across = du / w.clamp(min=1e-3)
    # Signed distances to the edge, < 0 inside
    disc = (torch.sqrt(across**2 + dv**2 + 1e-9) - 1) * torch.minimum(w, h)
    slab = torch.maximum(du.abs() - w, (dv.abs() - 1) * h)
    return (0.5 - torch.where(shape == ROUND, disc, slab) / soft).clamp(0, 1), across, dv


def paint(scenes, i, k, u, v, image, soft):
    """Object k of scene i over `image` (n, 3, H, W). -> image, coverage (n, H, W)"""
    tint, direct = TIME[scenes.time[i], :3], TIME[scenes.time[i], 9]
    sun, up = scenes.sun[i], torch.full((len(i),), 0.7)
    light = torch.stack([sun.sin() * 0.71, up, -sun.cos() * 0.71], 1)  # (n, 3): x, y, to the camera
    coverage = torch.zeros_like(u + v)
    for p in range(PART.shape[1]):
        j, part, uj, vj = pose(scenes, i, k, p, u, v)
        if not len(j):
            continue
        alpha, across, dv = cover_part(part, uj, vj, soft[j])

        # Lambert's law, on normals that suit the shape. Something box-like shows two sides.
        shape = part[:, 0, None, None]
        left, right = sides(YAW + scenes.turn[i[j], k[j]])[:, :, None, None]
        edge = part[:, 3, None, None] * (left - right) / (left + right)
        faces = torch.where(uj > edge, 0.87 * left, -0.9 * right)
        nx = torch.where(shape == FACETED, faces, across * 0.9).clamp(-0.99, 0.99)
        ny = torch.where(shape == ROUND, dv * 0.9, 0.2).clamp(-0.99, 0.99)
        nz = (1 - nx**2 - ny**2).clamp(min=0.0).sqrt()
        n_dot_l = sum(n * l[:, None, None] for n, l in zip((nx, ny, nz), light[j].T))
        shade = 0.62 + direct[j, None, None] * n_dot_l.clamp(min=-0.2)

        own = COLOUR[scenes.colour[i[j], k[j]]]
        colour = torch.where(part[:, 6:7] == OWN, own, FIXED[part[:, 6].long()]) * tint[j]
        colour = colour[:, :, None, None] * shade[:, None]
        image[j] = torch.lerp(image[j], colour, alpha[:, None])
        coverage[j] = torch.maximum(coverage[j], alpha)
    return image, coverage


def draw_sky(scenes, x, y, pixel):
    """Gradient, clouds, sun or moon, hills. -> sky (B, 3, H, W), horizon's haze (B, 3, 1, 1)"""
    tint, top, bottom = TIME[scenes.time, :9, None, None].split(3, 1)  # (B, 3, 1, 1) each
    p = scenes.texture[:, :, None, None]
    horizon, sun = scenes.horizon[:, None, None], scenes.sun[:, None, None]
    sky = torch.lerp(top, bottom, (y / horizon).clamp(0, 1)[:, None])
    soft = pixel + out_of_focus(scenes, slice(None), torch.inf)

    streaks = torch.sin(9 * x + 2 * torch.sin(14 * y + p[:, 2]))
    cloud = streaks * torch.sin(21 * y + 2 * torch.sin(4 * x + p[:, 3]))
    sky = torch.lerp(sky, bottom * 0.5 + 0.5 * tint, (0.5 * cloud).clamp(min=0)[:, None])

    # The light is in the picture when it is ahead (cos > 0): shadows then fall towards the camera.
    disc_x, disc_y = 0.5 + 0.36 * sun.sin(), horizon * 0.38
    r = torch.sqrt((x - disc_x) ** 2 + (y - disc_y) ** 2)
    disc = ((0.045 - r) / soft + 0.5).clamp(0, 1)
    glow = 0.35 * torch.exp(-((r / 0.09) ** 2))
    disc = (disc + glow).clamp(0, 1) * (sun.cos() > 0)
    sky = torch.lerp(sky, torch.tensor([1.0, 0.96, 0.84])[:, None, None], disc[:, None])

    hills = horizon - 0.05 + 0.03 * torch.sin(5 * x + p[:, 4]) + 0.018 * torch.sin(13 * x + p[:, 5])
    far = (bottom + tint * torch.tensor([0.25, 0.36, 0.34])[:, None, None]) / 2
    return torch.lerp(sky, far * 0.8, ((y - hills) / soft + 0.5).clamp(0, 1)[:, None]), bottom


def draw_ground(scenes, ground, z, haze):
    """-> (B, 3, H, W); only its part below the horizon is seen."""
    gx, gz = ground
    p = scenes.texture[:, :, None, None]
    fx, fz, amplitude = (GROUND[scenes.ground, j][:, None, None] for j in (3, 4, 5))
    warp_x, warp_z = 2 * torch.sin(1.3 * gz + p[:, 0]), 2 * torch.sin(0.9 * gx + p[:, 1])
    wave = torch.sin(fx * gx + warp_x) * torch.sin(fz * gz + warp_z)
    fade = torch.exp(-0.35 * (z - 2).clamp(min=0))  # far away the texture would alias: haze sets in
    colour = (GROUND[scenes.ground, :3] * TIME[scenes.time, :3])[:, :, None, None]
    seen = fade * torch.exp(-((20 * out_of_focus(scenes, slice(None), z)) ** 2))
    colour = colour * (1 + amplitude * seen * wave)[:, None]
    return torch.lerp(haze, colour, (0.25 + 0.75 * fade)[:, None])


def cast_shadows(scenes, i, k, ground, land):
    """Darken `land` in place where object k of scene i stands in the light's way."""
    sun = scenes.sun[i][:, None, None]
    size = scenes.size[i, k][:, None, None]
    length = TIME[scenes.time[i], 10][:, None, None]
    dx, dz = (g[i] - s[i, k][:, None, None] for g, s in zip(ground, (scenes.x, scenes.z)))
    # The ground dx, dz from the foot is dark if its ray to the light meets the figure, at u, v.
    v = -dz / (length * sun.cos())
    u = dx + length * v * sun.sin()
    touch = torch.exp(-(dx**2 + (2.5 * dz) ** 2) / (0.18 * size**2))  # hardly any light under it
    touch = touch * torch.exp(-4 * scenes.lift[i, k] / scenes.size[i, k])[:, None, None]
    figure = cover_figure(scenes, i, k, u / size, v / size, 0.12)
    dark = 0.45 * torch.maximum(figure, touch * 0.8)
    land[i] *= 1 - dark[:, None]


def cover_figure(scenes, i, k, u, v, soft):
    """Coverage (n, H, W) of whole figures, all parts together that make their outline."""
    soft = torch.full((len(i), 1, 1), soft)
    cover = torch.zeros_like(u + v)
    for p in range(PART.shape[1]):
        j, part, uj, vj = pose(scenes, i, k, p, u, v)
        outline = part[:, 7] == CASTS
        j = j[outline]
        if len(j):
            one, _, _ = cover_part(part[outline], uj[outline], vj[outline], soft[j])
            cover[j] = torch.maximum(cover[j], one)
    return cover


def reflect(scenes, i, k, x, y, ground, land, pixel):
    """Draw object k of scene i onto `land` in place, mirrored at its foot and broken by ripples."""
    u, v, scale = to_object(scenes, i, k, x[i], y[i])
    ripple = 0.04 * torch.sin(9 * ground[1][i] + scenes.texture[i, 0, None, None])
    mirrored, cover = paint(scenes, i, k, u + ripple, -v, land[i], 1.5 * pixel[i] / scale)
    land[i] = torch.lerp(land[i], mirrored, 0.6 * cover[:, None])
