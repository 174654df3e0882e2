"""Edits of the toy world's scenes, as a user of Magic Fixup makes them, and what they truly look like.

    edited, edits = random_edits(scenes, generator)
    render(edited)                                       the truth, shadows and reflections included
    to_collage(edited[i : i + 1], edits[i], segments)    the same edit of a picture, for collage.composite
    edit_pictures(scenes, generator)                     pictures before, coarse edits with their masks, the truth
    edited, told = random_instructions(scenes, generator)    edits told in words, for InstructPix2Pix
"""

from dataclasses import dataclass, replace

import torch

import collage
from toy.world import COLOURS, GROUNDS, KINDS, POSE, TIMES, project, render

VERBS = ("move", "scale", "duplicate", "delete")


@dataclass
class Edit:
    """What a user did to one object of a scene."""

    k: int  # the object
    verb: str  # one of VERBS
    # (2, 3) float64: where a point x, y of the object goes in the picture, in pixels, as a figure that faces the camera
    # does exactly; the picture spans 0 .. size. None: deleted
    matrix: torch.Tensor | None


def random_edits(scenes, generator=None, size=128):
    """One edit of one object for each scene (each has an object). Same generator state, same edits.

      ->  edited, a Scene with room for one more object, where a duplicate's copy is; and a list of B `Edit`s for
          pictures of `size` pixels
    """

    def uniform(lo, hi, *shape):
        return lo + (hi - lo) * torch.rand(*shape, generator=generator)

    B, K = scenes.kind.shape
    row = torch.arange(B)
    k = torch.multinomial((scenes.kind >= 0).double(), 1, generator=generator)[:, 0]
    verb = torch.randint(len(VERBS), (B,), generator=generator)
    moves, scales, duplicates, deletes = (verb == VERBS.index(v) for v in ("move", "scale", "duplicate", "delete"))

    # n places for the object to go: aside, or in every other scene nearer or farther too.
    n = 16
    new_px = uniform(0.14, 0.86, B, n)
    along = torch.rand(B, 1, generator=generator) < 0.5
    new_z = torch.where(along, uniform(2.1, 4.6, B, n), scenes.z[row, k, None])

    # The first is taken that hides no other object and differs from its own place (by half as much, if it leaves that),
    # or else the one that is best.
    camera_x, camera_z = scenes.camera[:, :1], scenes.camera[:, 1:]
    distance = scenes.z - camera_z
    px = 0.5 + (scenes.x - camera_x) / distance  # (B, K)
    width = scenes.size / distance  # (B, K)
    new_width = scenes.size[row, k, None] / (new_z - camera_z)  # (B, n)
    need = 0.3 * (width[:, None] + new_width[..., None])  # (B, n, K)
    leaves = moves[:, None] & (torch.arange(K) == k[:, None])  # (B, K)
    need = torch.where(leaves[:, None], need / 2, need)
    apart = (new_px[..., None] - px[:, None]).abs() / need
    apart = apart.where((scenes.kind >= 0)[:, None], torch.inf)
    best = apart.amin(2).clamp(max=1).argmax(1)
    new_px, new_z = new_px[row, best], new_z[row, best]

    # A small object grows and a large one shrinks, else either.
    factor = uniform(1.25, 1.5, B)
    grow = torch.rand(B, generator=generator) < 0.5
    here = width[row, k]
    factor = torch.where((here < 0.18) | grow & (here < 0.34), factor, 1 / factor)

    changed = torch.where(duplicates, K, k)  # the slot of the object that is edited, or of its copy

    def set_changed(field, value):
        """(B, K) -> (B, K + 1)"""
        field = torch.cat([field, field[row, k, None]], 1)
        field[row, changed] = value.to(field.dtype)
        return field

    stays = ~(moves | duplicates)
    new_x = camera_x[:, 0] + (new_px - 0.5) * (new_z - camera_z[:, 0])
    kind = set_changed(scenes.kind, torch.where(deletes, -1, scenes.kind[row, k]))
    kind[~duplicates, K] = -1
    edited = replace(
        scenes,
        kind=kind,
        **{name: set_changed(getattr(scenes, name), getattr(scenes, name)[row, k]) for name in ("colour", *POSE)},
        x=set_changed(scenes.x, torch.where(stays, scenes.x[row, k], new_x)),
        z=set_changed(scenes.z, torch.where(stays, scenes.z[row, k], new_z)),
        size=set_changed(scenes.size, scenes.size[row, k] * torch.where(scales, factor, 1.0)),
    )

    # Between two places a flat figure scales and shifts.
    old_x, old_y, old_scale = (s.flatten().double() for s in project(scenes, row, k))
    new_x, new_y, new_scale = (s.flatten().double() for s in project(edited, row, changed))
    s = new_scale / old_scale
    zero = torch.zeros(B, dtype=torch.double)
    matrix = torch.stack([s, zero, (new_x - s * old_x) * size, zero, s, (new_y - s * old_y) * size], 1).view(B, 2, 3)
    return edited, [Edit(k[i].item(), VERBS[verb[i]], None if deletes[i] else matrix[i]) for i in range(B)]


def to_collage(edited, edit, segments):
    """The same edit of one picture, for `collage.composite`: what a user sees is what can be dragged.

    edited    one scene of `random_edits` (`edited[i : i + 1]`), and its `edit`
    segments  (H, W), of the picture before
      ->      [(mask (H, W) bool, matrix or None)], from back to front: an object that goes behind another is hidden
    """
    K = edited.kind.shape[1] - 1
    stays = torch.eye(2, 3, dtype=torch.double)
    changed = {"duplicate": K, "delete": None}.get(edit.verb, edit.k)
    pieces = []
    for slot in edited.z[0].argsort(descending=True).tolist():
        if edited.kind[0, slot] >= 0:
            k = slot if slot < K else edit.k  # a copy has the original's pixels
            pieces.append((segments == k + 1, edit.matrix if slot == changed else stays))
    return [*pieces, (segments == edit.k + 1, None)]


def edit_pictures(scenes, generator=None, size=128):
    """One random edit of each scene, in pictures, as `collage.composite` makes it of the picture before.

      ->  edited, edits, as of `random_edits`; before, after, the Frames of both; coarse (B, 3, size, size) in [0, 1],
          its holes painted in; mask (B, 1, size, size), 1 = kept
    """
    edited, edits = random_edits(scenes, generator, size)
    before, after = render(scenes, size), render(edited, size)
    coarse, mask = [], []
    for i, image in enumerate((before.image * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        edit = collage.composite(image, to_collage(edited[i : i + 1], edits[i], before.segments[i]))
        holes = edit[..., 3] == 0
        coarse.append(torch.from_numpy(collage.fill_holes(edit[..., :3], holes)).permute(2, 0, 1) / 255)
        mask.append(torch.from_numpy(~holes)[None].float())
    return edited, edits, before, after, torch.stack(coarse), torch.stack(mask)


def random_instructions(scenes, generator=None):
    """One edit of each scene, told as an order: another time, another ground, another colour of its first object, or
    that gone. -> edited, a Scene; [B texts]"""
    B, told = len(scenes), []
    edited = replace(scenes, **{n: getattr(scenes, n).clone() for n in ("time", "ground", "kind", "colour")})
    verb, more = (torch.randint(n, (B,), generator=generator).tolist() for n in (4, 30))  # 30: 2, 3 and 5 alike
    for i in range(B):
        what, kind = f"the {COLOURS[scenes.colour[i, 0]]} {KINDS[scenes.kind[i, 0]]}", ("time", "ground", "colour")
        if verb[i] == 3:
            edited.kind[i, 0] = -1
            told.append(f"remove {what}")
            continue
        names = (TIMES, GROUNDS, COLOURS)[verb[i]]
        field = getattr(edited, kind[verb[i]])
        place = (i, 0) if verb[i] == 2 else i
        field[place] = (field[place] + 1 + more[i] % (len(names) - 1)) % len(names)
        name = names[field[place]]
        told.append((f"make it {name}", f"turn the ground into {name}", f"paint {what} {name}")[verb[i]])
    return edited, told
