"""A small procedural world that knows the truth about its own pictures.

A `Scene` is a description, not a picture: where the horizon and the sun are, what the ground is made of, which objects
stand where. `render` draws a batch of scenes, with everything that a photograph ties together: perspective, occlusion,
shading, shadows cast on the ground away from the light, reflections in water. Because the description is small, an
edited scene (an object moved, the camera shifted) is drawn by the same function, shadows and reflections included.

World units: the camera stands one unit above the ground plane and looks along +z, x is to the right, y is up. It is a
pinhole with focal length 1 in units of the image's side: the ground point (x, z) is seen at

    px = 1/2 + (x - camera_x) / (z - camera_z)        py = horizon + 1 / (z - camera_z)         both in [0, 1]

Objects are flat figures facing the camera, `size` units large; light comes from the sun or the moon at azimuth `sun`.
"""

import math
from dataclasses import dataclass, fields, replace

import torch

# ---------------------------------------------------------------------------------------------------------------------
# What there is

GROUNDS = ("grass", "sand", "snow", "water")
TIMES = ("noon", "sunset", "night")
KINDS = ("ball", "box", "cone", "tree", "house", "mushroom")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")

#                     colour               texture: frequency in x, in z, amplitude
GROUND = torch.tensor([[0.36, 0.55, 0.18, 5.0, 4.0, 0.10],
                       [0.84, 0.74, 0.50, 1.5, 7.0, 0.06],
                       [0.90, 0.93, 0.97, 1.2, 1.5, 0.03],
                       [0.16, 0.42, 0.58, 1.0, 9.0, 0.09]])
#                   tint of the light     sky at the top        sky at the horizon    direct light, shadow length
TIME = torch.tensor([[1.00, 1.00, 1.00,   0.30, 0.55, 0.90,     0.75, 0.87, 0.97,     0.50, 0.7],
                     [0.98, 0.72, 0.58,   0.42, 0.30, 0.50,     1.00, 0.66, 0.36,     0.45, 1.3],
                     [0.40, 0.46, 0.70,   0.03, 0.04, 0.14,     0.13, 0.16, 0.32,     0.40, 0.9]])
COLOUR = torch.tensor([[0.86, 0.13, 0.10], [0.96, 0.80, 0.12], [0.12, 0.62, 0.25],
                       [0.14, 0.30, 0.90], [0.55, 0.18, 0.72], [0.95, 0.95, 0.95]])
OWN, BROWN, DARK, PALE = range(4)  # a part has the object's colour, or one of these
FIXED = torch.tensor([[0.0, 0.0, 0.0], [0.42, 0.27, 0.14], [0.28, 0.20, 0.18], [0.90, 0.86, 0.76]])
ROUND, TURNED, FACETED = range(3)  # an ellipse; a trapezoid shaded like a cone; one shaded like a box seen on its edge
#  shape, centre u, v, half width, half height, taper (top width = 1 - taper of the bottom's), colour. u, v in sizes
PARTS = {
    "ball": [(ROUND, 0.0, 0.50, 0.50, 0.50, 0.0, OWN)],
    "box": [(FACETED, 0.0, 0.42, 0.45, 0.42, 0.0, OWN)],
    "cone": [(TURNED, 0.0, 0.58, 0.48, 0.58, 0.95, OWN)],
    "tree": [(TURNED, 0.0, 0.25, 0.09, 0.26, 0.2, BROWN), (ROUND, 0.0, 0.92, 0.45, 0.50, 0.0, OWN)],
    "house": [(FACETED, 0.0, 0.34, 0.52, 0.34, 0.0, OWN), (FACETED, 0.0, 0.90, 0.64, 0.24, 0.8, DARK),
              (TURNED, -0.14, 0.20, 0.11, 0.20, 0.0, DARK)],
    "mushroom": [(TURNED, 0.0, 0.30, 0.15, 0.30, 0.2, PALE), (ROUND, 0.0, 0.64, 0.52, 0.28, 0.0, OWN)],
}
MAX_PARTS = max(map(len, PARTS.values()))
PART = torch.tensor([[*PARTS[k], *[(-1,) + (1,) * 6] * (MAX_PARTS - len(PARTS[k]))] for k in KINDS], dtype=torch.float)


@dataclass
class Scene:
    """B scenes with room for K objects each. Everything is a tensor on the CPU; any field may be edited and redrawn."""

    ground: torch.Tensor  # (B,) index into GROUNDS
    time: torch.Tensor  # (B,) index into TIMES
    horizon: torch.Tensor  # (B,) height of the horizon, 0 = the picture's top, 1 = its bottom
    sun: torch.Tensor  # (B,) azimuth of the light in radians: 0 = straight ahead, pi/2 = from the right
    texture: torch.Tensor  # (B, 6) phases of ground, clouds and hills, in radians
    camera: torch.Tensor  # (B, 2) x and z
    kind: torch.Tensor  # (B, K) index into KINDS, -1 where there is no object
    colour: torch.Tensor  # (B, K) index into COLOURS
    x: torch.Tensor  # (B, K) world
    z: torch.Tensor  # (B, K) world
    size: torch.Tensor  # (B, K) world

    def __len__(self):
        return len(self.ground)

    def __getitem__(self, index):
        """The scenes at `index` (a slice, a list or a tensor), as a Scene."""
        return Scene(*(getattr(self, f.name)[index] for f in fields(self)))


# ---------------------------------------------------------------------------------------------------------------------
# Random scenes and their captions


def random_scenes(n, generator=None, objects=3):
    """n scenes with 1 to `objects` objects that stand apart from each other. Same generator state, same scenes."""

    def uniform(lo, hi, *shape):
        return lo + (hi - lo) * torch.rand(*shape, generator=generator)

    def choice(options, *shape):
        return torch.randint(len(options), shape, generator=generator)

    horizon = uniform(0.36, 0.48, n)
    # A light near the picture plane would cast an infinitely thin shadow: keep 25 degrees away from it.
    sun = uniform(-1.1, 1.1, n) + math.pi * torch.randint(2, (n,), generator=generator)
    count = torch.multinomial(torch.tensor([0.5, 0.35, 0.15][:objects]), n, replacement=True, generator=generator)
    kind = choice(KINDS, n, objects).where(torch.arange(objects) <= count[:, None], torch.tensor(-1))
    # Columns of the picture are dealt out to the objects, so that they overlap at times but never hide each other.
    slot = torch.rand(n, objects, generator=generator).masked_fill(kind < 0, 9.0).argsort(1).argsort(1)
    width = 1.0 / (count[:, None] + 1)
    px = (slot + 0.5) * width + uniform(-0.28, 0.28, n, objects) * width
    z = uniform(2.1, 4.6, n, objects)
    return Scene(
        ground=choice(GROUNDS, n), time=choice(TIMES, n), horizon=horizon, sun=sun, texture=uniform(0, 6.28, n, 6),
        camera=torch.zeros(n, 2), kind=kind, colour=choice(COLOURS, n, objects), x=(px - 0.5) * 0.9 * z, z=z,
        size=uniform(0.62, 0.95, n, objects),
    )


def captions(scenes, generator=None):
    """One caption in natural words per scene. Now and then objects or time go unmentioned, as people leave them out."""

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def one(i):
        order = scenes.x[i].argsort().tolist()  # as people read: from left to right
        order = [k for k in order if scenes.kind[i, k] >= 0]
        things = [f"a {COLOURS[scenes.colour[i, k]]} {KINDS[scenes.kind[i, k]]}" for k in order]
        things = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
        ground, time = GROUNDS[scenes.ground[i]], TIMES[scenes.time[i]]
        where = f"{pick('on', 'on', 'on the')} {ground}"
        return pick(
            *4 * [f"{things} {where} at {time}"], f"a photo of {things} {where} at {time}",
            f"at {time}, {things} {where}", f"{things}, {ground}, {time}", f"{ground} at {time}",
            f"{things} {where}", f"{things} at {time}",
        )

    return [one(i) for i in range(len(scenes))]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


@dataclass
class Frames:
    """What the camera sees."""

    image: torch.Tensor  # (B, 3, H, W) in [0, 1]
    segments: torch.Tensor  # (B, H, W) uint8: 0 = background, k + 1 = object k
    depth: torch.Tensor  # (B, H, W) distance z from the camera, inf in the sky


def render(scenes, size=128):
    """Draw the scenes at `size` x `size` pixels. -> Frames"""
    B, px = len(scenes), (torch.arange(size) + 0.5) / size
    x, y = px[None, None, :], px[None, :, None]  # (1, 1, W), (1, H, 1): broadcast, not stored
    horizon, cam_x, cam_z = (s[:, None, None] for s in (scenes.horizon, *scenes.camera.T))
    z = 1 / (y - horizon).clamp(min=1e-3)  # (B, H, 1) distance of the ground seen in this row
    ground = (cam_x + (x - 0.5) * z, cam_z + z)  # world x (B, H, W) and z (B, H, 1) of each pixel's ground point
    below = ((y - horizon) * size + 0.5).clamp(0, 1)  # (B, H, 1) coverage by the ground plane

    sky, haze = draw_sky(scenes, x, y, size)
    land = draw_ground(scenes, ground, z, haze)
    back_to_front = [present(scenes, slot) for slot in scenes.z.argsort(1, descending=True).T]
    for i, k in back_to_front:  # what the ground shows of the objects, then the objects
        wet = scenes.ground[i] == GROUNDS.index("water")
        cast_shadows(scenes, i[~wet], k[~wet], ground, land)
        reflect(scenes, i[wet], k[wet], x, y, ground, land, size)
    image = torch.lerp(sky, land, below[:, None])

    segments = torch.zeros(B, size, size, dtype=torch.uint8)
    depth = torch.where(y > horizon, z, torch.inf).expand(B, size, size).clone()
    for i, k in back_to_front:
        u, v, scale = local(scenes, i, k, x, y)
        image[i], alpha = paint(scenes, i, k, u, v, image[i], 1 / (scale * size))
        body = alpha > 0.5
        segments[i] = torch.where(body, (k + 1).to(torch.uint8)[:, None, None], segments[i])
        depth[i] = torch.where(body, (scenes.z[i, k] - scenes.camera[i, 1])[:, None, None], depth[i])
    return Frames(image.clamp_(0, 1), segments, depth)


def present(scenes, slot):
    """Indices (n,) of the scenes whose object number `slot` (B,) exists, and those numbers (n,)."""
    i = (scenes.kind[torch.arange(len(slot)), slot] >= 0).nonzero()[:, 0]
    return i, slot[i]


def local(scenes, i, k, x, y):
    """Pixels in object coordinates: u to the right, v up from the foot, in object sizes; and pixels' sides per size."""
    foot_x, foot_y, scale = place(scenes, i, k)
    return (x - foot_x) / scale, (foot_y - y) / scale, scale


def place(scenes, i, k):
    """Where object k of scene i stands on the screen, in 0 .. 1, and how large one object size is; (n, 1, 1) each."""
    distance = scenes.z[i, k] - scenes.camera[i, 1]
    foot_x = 0.5 + (scenes.x[i, k] - scenes.camera[i, 0]) / distance
    return (s[:, None, None] for s in (foot_x, scenes.horizon[i] + 1 / distance, scenes.size[i, k] / distance))


def silhouette(part, u, v, soft):
    """Coverage in [0, 1] of one part per object, with an edge `soft` object sizes wide. -> coverage, u / half width"""
    shape, cu, cv, w, h, taper = (part[:, j, None, None] for j in range(6))
    du, dv = u - cu, (v - cv) / h
    w = w * (1 - taper * (dv.clamp(-1, 1) + 1) / 2)
    across = du / w.clamp(min=1e-3)
    disc = (torch.sqrt(across**2 + dv**2 + 1e-9) - 1) * torch.minimum(w, h)  # signed distances, < 0 inside
    slab = torch.maximum(du.abs() - w, (dv.abs() - 1) * h)
    return (0.5 - torch.where(shape == ROUND, disc, slab) / soft).clamp(0, 1), across, dv


def paint(scenes, i, k, u, v, image, soft):
    """Object k of scene i over `image` (n, 3, H, W). -> image, coverage (n, H, W)"""
    tint, direct = TIME[scenes.time[i], :3], TIME[scenes.time[i], 9]
    sun, up = scenes.sun[i], 0.7
    light = torch.stack([sun.sin() * 0.71, torch.full_like(sun, up), -sun.cos() * 0.71], 1)  # last: towards the camera
    coverage = torch.zeros_like(u + v)
    for p in range(MAX_PARTS):
        part = PART[scenes.kind[i, k], p]
        j = (part[:, 0] >= 0).nonzero()[:, 0]
        if not len(j):
            continue
        uj, vj, part = u[j], v[j], part[j]
        alpha, across, dv = silhouette(part, uj, vj, soft[j])
        shape = part[:, 0, None, None]
        edge = torch.where(uj > 0.18, 0.8, -0.35)  # the two visible faces of something box-like
        nx = torch.where(shape == FACETED, edge, across * 0.9).clamp(-0.99, 0.99)
        ny = torch.where(shape == ROUND, dv * 0.9, 0.2).clamp(-0.99, 0.99)
        nz = (1 - nx**2 - ny**2).clamp(min=0.0).sqrt()
        n_dot_l = sum(n * l[:, None, None] for n, l in zip((nx, ny, nz), light[j].T))
        shade = 0.62 + direct[j, None, None] * n_dot_l.clamp(min=-0.2)
        own = COLOUR[scenes.colour[i[j], k[j]]]
        paint_j = torch.where(part[:, 6:7] == OWN, own, FIXED[part[:, 6].long()]) * tint[j]
        image[j] = torch.lerp(image[j], paint_j[:, :, None, None] * shade[:, None], alpha[:, None])
        coverage[j] = torch.maximum(coverage[j], alpha)
    return image, coverage


def draw_sky(scenes, x, y, size):
    """Gradient, clouds, sun or moon, hills. -> sky (B, 3, H, W), colour of the haze at the horizon (B, 3, 1, 1)"""
    tint, top, bottom = TIME[scenes.time].split([3, 3, 3, 2], 1)[:3]
    top, bottom = top[:, :, None, None], bottom[:, :, None, None]
    p = scenes.texture[:, :, None, None]
    horizon, sun = scenes.horizon[:, None, None], scenes.sun[:, None, None]
    sky = torch.lerp(top, bottom, (y / horizon).clamp(0, 1)[:, None])
    cloud = torch.sin(9 * x + 2 * torch.sin(14 * y + p[:, 2])) * torch.sin(21 * y + 2 * torch.sin(4 * x + p[:, 3]))
    sky = torch.lerp(sky, bottom * 0.5 + 0.5 * tint[:, :, None, None], (0.5 * cloud).clamp(min=0)[:, None])
    # The light stands in the picture when it is ahead (cos > 0); its shadows then fall towards the camera.
    disc_x, disc_y = 0.5 + 0.36 * sun.sin(), horizon * 0.38
    r = torch.sqrt((x - disc_x) ** 2 + (y - disc_y) ** 2)
    disc = (((0.045 - r) * size + 0.5).clamp(0, 1) + 0.35 * torch.exp(-((r / 0.09) ** 2))).clamp(0, 1) * (sun.cos() > 0)
    sky = torch.lerp(sky, torch.tensor([1.0, 0.96, 0.84])[:, None, None], disc[:, None])
    hills = horizon - 0.05 + 0.03 * torch.sin(5 * x + p[:, 4]) + 0.018 * torch.sin(13 * x + p[:, 5])
    far = (bottom + tint[:, :, None, None] * torch.tensor([0.25, 0.36, 0.34])[:, None, None]) / 2
    return torch.lerp(sky, far * 0.8, ((y - hills) * size + 0.5).clamp(0, 1)[:, None]), bottom


def draw_ground(scenes, ground, z, haze):
    """-> (B, 3, H, W); only its part below the horizon will be seen."""
    gx, gz = ground
    p = scenes.texture[:, :, None, None]
    fx, fz, amplitude = (GROUND[scenes.ground, j][:, None, None] for j in (3, 4, 5))
    warp_x, warp_z = 2 * torch.sin(1.3 * gz + p[:, 0]), 2 * torch.sin(0.9 * gx + p[:, 1])
    wave = torch.sin(fx * gx + warp_x) * torch.sin(fz * gz + warp_z)
    fade = torch.exp(-0.35 * (z - 2).clamp(min=0))  # towards the horizon the texture would alias, and haze sets in
    colour = (GROUND[scenes.ground, :3] * TIME[scenes.time, :3])[:, :, None, None]
    return torch.lerp(haze, colour * (1 + amplitude * fade * wave)[:, None], (0.25 + 0.75 * fade)[:, None])


def cast_shadows(scenes, i, k, ground, land):
    """Darken `land` in place where object k of scene i stands in the light's way."""
    size, length, sun = (s[:, None, None] for s in (scenes.size[i, k], TIME[scenes.time[i], 10], scenes.sun[i]))
    dx, dz = (g[i] - s[i, k][:, None, None] for g, s in zip(ground, (scenes.x, scenes.z)))
    # The ground point (dx, dz) from the foot is dark if the ray to the light passes through the figure, at (u, v).
    v = -dz / (length * sun.cos())
    u = dx + length * v * sun.sin()
    touch = torch.exp(-(dx**2 + (2.5 * dz) ** 2) / (0.18 * size**2))  # where light hardly reaches, under the object
    dark = 0.45 * torch.maximum(outline(scenes.kind[i, k], u / size, v / size, 0.12), touch * 0.8)
    land[i] *= 1 - dark[:, None]


def outline(kind, u, v, soft):
    """Coverage of whole figures, all parts together, where only the outline matters."""
    soft, cover = torch.full((len(kind), 1, 1), soft), torch.zeros_like(u + v)
    for p in range(MAX_PARTS - 1):  # the last part of the only figure with three is its door, inside the outline
        part = PART[kind, p]
        j = (part[:, 0] >= 0).nonzero()[:, 0]
        if len(j):
            cover[j] = torch.maximum(cover[j], silhouette(part[j], u[j], v[j], soft[j])[0])
    return cover


def reflect(scenes, i, k, x, y, ground, land, size):
    """Draw object k of scene i onto `land` in place, mirrored at its foot and broken up by ripples."""
    u, v, scale = local(scenes, i, k, x, y)
    ripple = 0.04 * torch.sin(9 * ground[1][i] + scenes.texture[i, 0, None, None])
    mirrored, cover = paint(scenes, i, k, u + ripple, -v, land[i], 1.5 / (scale * size))
    land[i] = torch.lerp(land[i], mirrored, 0.6 * cover[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Motion


def moved(scenes, velocity, camera_velocity, time):
    """The scenes `time` later. velocity (B, K, 2), camera_velocity (B, 2): x and z in world units per unit of time."""
    return replace(scenes, x=scenes.x + time * velocity[..., 0], z=scenes.z + time * velocity[..., 1],
                   camera=scenes.camera + time * camera_velocity)


def flow_between(a, b, frames):
    """Exact optical flow from scenes `a` to `b`, the same scenes moved; frames: `render(a)`.

      ->  (B, 2, H, W) in pixels, x before y: where the *surface* seen at each pixel of `a` is in `b`, hidden there or
          not. The sky is infinitely far; shadows and reflections count as ground. NaN where it is behind the camera.
    """
    size = frames.image.shape[-1]
    px = (torch.arange(size) + 0.5) / size
    x, y = px[None, None, :], px[None, :, None]
    z_a, horizon = 1 / (y - a.horizon[:, None, None]).clamp(min=1e-6), b.horizon[:, None, None]
    shift_x, shift_z = ((s - t)[:, None, None] for s, t in zip(a.camera.T, b.camera.T))
    z_b = z_a + shift_z
    ahead = torch.where(z_b > 0, z_b, torch.nan)
    to_x, to_y = 0.5 + ((x - 0.5) * z_a + shift_x) / ahead, (horizon + 1 / ahead).expand(-1, -1, size)
    sky = (y <= a.horizon[:, None, None]).expand_as(to_x)
    to_x, to_y = torch.where(sky, x, to_x), torch.where(sky, y, to_y)
    for slot in range(a.kind.shape[1]):
        i, k = present(a, torch.full((len(a),), slot))
        u, v, _ = local(a, i, k, x, y)
        foot_x, foot_y, scale = place(b, i, k)
        here = frames.segments[i] == slot + 1
        to_x[i] = torch.where(here, foot_x + u * scale, to_x[i])
        to_y[i] = torch.where(here, foot_y - v * scale, to_y[i])
    return torch.stack([to_x - x, to_y - y], 1) * size


# ---------------------------------------------------------------------------------------------------------------------
# Edits, as a user of Magic Fixup makes them, and what they truly look like

VERBS = ("move", "scale", "duplicate", "delete")


@dataclass
class Edit:
    """What a user did to one object of a scene."""

    k: int  # the object
    verb: str  # one of VERBS
    matrix: torch.Tensor | None  # (2, 3) float64: where a point x, y of it goes in the picture, in pixels, as a figure
    #                              that faces the camera does exactly; the picture spans 0 .. size. None: deleted


def random_edits(scenes, generator=None, size=128):
    """One edit of one object for each scene (each has an object). Same generator state, same edits.

      ->  edited, a Scene with room for one more object, where a duplicate's copy is (`render` it for the truth, shadows
          and reflections included); and a list of B `Edit`s for pictures of `size` pixels
    """

    def uniform(lo, hi, *shape):
        return lo + (hi - lo) * torch.rand(*shape, generator=generator)

    (B, K), row, n = scenes.kind.shape, torch.arange(len(scenes)), 16
    k = torch.multinomial((scenes.kind >= 0).double(), 1, generator=generator)[:, 0]
    verb = torch.randint(len(VERBS), (B,), generator=generator)
    moves, scales, duplicates, deletes = (verb == VERBS.index(v) for v in ("move", "scale", "duplicate", "delete"))
    # n places for the object to go: aside, or in every other scene nearer or farther too. The first is taken that hides
    # no other object and differs from its own place (by half as much, if it leaves that), or else the one that is best.
    new_px, along = uniform(0.14, 0.86, B, n), torch.rand(B, 1, generator=generator) < 0.5
    new_z = torch.where(along, uniform(2.1, 4.6, B, n), scenes.z[row, k, None])
    camera_x, camera_z = scenes.camera[:, :1], scenes.camera[:, 1:]
    distance = scenes.z - camera_z
    px, width = 0.5 + (scenes.x - camera_x) / distance, scenes.size / distance  # (B, K)
    need = 0.3 * (width[:, None] + (scenes.size[row, k, None] / (new_z - camera_z))[..., None])  # (B, n, K)
    need = torch.where((moves[:, None] & (torch.arange(K) == k[:, None]))[:, None], need / 2, need)
    apart = ((new_px[..., None] - px[:, None]).abs() / need).where((scenes.kind >= 0)[:, None], torch.inf)
    best = apart.amin(2).clamp(max=1).argmax(1)
    new_px, new_z = new_px[row, best], new_z[row, best]
    # A small object grows and a large one shrinks, else either.
    factor, grow = uniform(1.25, 1.5, B), torch.rand(B, generator=generator) < 0.5
    here = width[row, k]
    factor = torch.where((here < 0.18) | grow & (here < 0.34), factor, 1 / factor)

    def one_more(field, value):  # (B, K) -> (B, K + 1); the object that is edited, or its copy, gets the value
        field = torch.cat([field, field[row, k, None]], 1)
        field[row, torch.where(duplicates, K, k)] = value.to(field.dtype)
        return field

    stays = ~(moves | duplicates)
    new_x = camera_x[:, 0] + (new_px - 0.5) * (new_z - camera_z[:, 0])
    kind = one_more(scenes.kind, torch.where(deletes, -1, scenes.kind[row, k]))
    kind[~duplicates, K] = -1
    edited = replace(
        scenes, kind=kind, colour=one_more(scenes.colour, scenes.colour[row, k]),
        x=one_more(scenes.x, torch.where(stays, scenes.x[row, k], new_x)),
        z=one_more(scenes.z, torch.where(stays, scenes.z[row, k], new_z)),
        size=one_more(scenes.size, scenes.size[row, k] * torch.where(scales, factor, 1.0)),
    )
    old, new = place(scenes, row, k), place(edited, row, torch.where(duplicates, K, k))
    old_x, old_y, old_scale, new_x, new_y, new_scale = (s.flatten().double() for s in (*old, *new))
    s, zero = new_scale / old_scale, torch.zeros(B, dtype=torch.double)
    matrix = torch.stack([s, zero, (new_x - s * old_x) * size, zero, s, (new_y - s * old_y) * size], 1).view(B, 2, 3)
    return edited, [Edit(k[i].item(), VERBS[verb[i]], None if deletes[i] else matrix[i]) for i in range(B)]


def pieces(edited, edit, segments):
    """The same edit of one picture as a collage, for `collage.composite`: what a user sees is what can be dragged.

    edited    one scene of `random_edits` (`edited[i : i + 1]`), and its `edit`
    segments  (H, W), of the picture before
      ->      [(mask (H, W) bool, matrix or None)], from back to front: an object that goes behind another is hidden
    """
    K, stays = edited.kind.shape[1] - 1, torch.eye(2, 3, dtype=torch.double)
    after = [slot for slot in edited.z[0].argsort(descending=True).tolist() if edited.kind[0, slot] >= 0]
    changed = {"duplicate": K, "delete": None}.get(edit.verb, edit.k)
    order = [(slot if slot < K else edit.k, edit.matrix if slot == changed else stays) for slot in after]
    return [(segments == k + 1, matrix) for k, matrix in order + [(edit.k, None)]]
