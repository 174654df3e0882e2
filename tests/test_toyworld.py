"""The toy world keeps the promises that its pictures are judged by."""

import dataclasses
import math

import pytest
import torch

import collage
import warp
from toy import world as toyworld
from toy.world import COLOURS, GROUNDS, KINDS, TIMES, Scene, captions, random_scenes, render


def scene(ground="sand", time="noon", sun=0.6, kind=("ball",), colour=("red",), x=(0.0,), z=(3.0,), size=(0.8,)):
    return Scene(
        ground=torch.tensor([GROUNDS.index(ground)]), time=torch.tensor([TIMES.index(time)]),
        horizon=torch.tensor([0.42]), sun=torch.tensor([sun]), texture=torch.zeros(1, 6), camera=torch.zeros(1, 2),
        kind=torch.tensor([[KINDS.index(k) if k else -1 for k in kind]]),
        colour=torch.tensor([[COLOURS.index(c) for c in colour]]),
        x=torch.tensor([x]), z=torch.tensor([z]), size=torch.tensor([size]),
    )


def test_same_seed_same_pictures_and_captions():
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        scenes = random_scenes(6, g)
        return render(scenes).image, captions(scenes, g)

    a, b, c = draw(1), draw(1), draw(2)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert not torch.equal(a[0], c[0]) and a[1] != c[1]


def test_a_scene_looks_the_same_in_any_batch():
    scenes = random_scenes(8, torch.Generator().manual_seed(0))
    whole = render(scenes)
    for i in range(8):
        alone = render(scenes[i : i + 1])
        torch.testing.assert_close(alone.image[0], whole.image[i], atol=1e-5, rtol=0)
        assert torch.equal(alone.segments[0], whole.segments[i])


def test_objects_stand_where_the_camera_model_says():
    s = scene(x=(0.5,), z=(4.0,))
    segments = render(s, 256).segments[0]
    rows, columns = (segments == 1).nonzero().T
    assert columns.float().mean() / 256 == pytest.approx(0.5 + 0.5 / 4, abs=0.01)
    assert rows.max() / 256 == pytest.approx(0.42 + 1 / 4, abs=0.01)
    assert (columns.max() - columns.min() + 1) / 256 == pytest.approx(0.8 / 4, abs=0.01)  # a ball is one size wide


def test_nearer_objects_hide_farther_ones_and_depth_agrees():
    s = scene(kind=("box", "ball"), colour=("red", "blue"), x=(0.0, 0.0), z=(4.0, 2.5), size=(0.8, 0.8))
    f = render(s)
    assert (f.segments[0] == 1).any() and (f.segments[0] == 2).any()
    assert (f.depth[0][f.segments[0] == 2] == 2.5).all() and (f.depth[0][f.segments[0] == 1] == 4.0).all()
    assert f.depth[0, 0, 0] == math.inf
    alone = render(dataclasses.replace(s, kind=torch.tensor([[KINDS.index("box"), -1]])))
    assert ((f.segments == 1).sum() < (alone.segments == 1).sum()).item()


@pytest.mark.parametrize("sun", [0.7, -0.7, math.pi - 0.7, math.pi + 0.7])
def test_shadows_fall_away_from_the_light(sun):
    s = scene(sun=sun, z=(3.0,))
    empty = dataclasses.replace(s, kind=torch.tensor([[-1]]))
    with_it, without = render(s, 256), render(empty, 256)
    darker = ((without.image - with_it.image).mean(1)[0] > 0.04) & (with_it.segments[0] == 0)
    rows, columns = darker.nonzero().T.float() / 256
    assert darker.sum() > 200
    assert math.copysign(1, columns.mean() - 0.5) == -math.copysign(1, math.sin(sun))
    foot = 0.42 + 1 / 3
    assert math.copysign(1, rows.mean() - foot) == math.copysign(1, math.cos(sun))  # light ahead: towards the camera
    assert (rows > 0.42).all()


def test_water_reflects_and_dry_ground_does_not():
    for ground, reflects in (("water", True), ("snow", False)):
        s = scene(ground, z=(3.0,), sun=math.pi + 0.5)  # light from behind: no shadow below the foot
        empty = dataclasses.replace(s, kind=torch.tensor([[-1]]))
        change = (render(s, 256).image - render(empty, 256).image)[0, :, int((0.42 + 1 / 3 + 0.06) * 256), 128]
        assert (change[0] - change[2] > 0.15).item() is reflects  # redder below the ball


def test_deleting_an_object_leaves_no_trace():
    s = random_scenes(16, torch.Generator().manual_seed(5))
    gone = dataclasses.replace(s, kind=torch.full_like(s.kind, -1))
    f = render(gone)
    assert f.segments.max() == 0
    moved = dataclasses.replace(gone, x=s.x + 1)
    assert torch.equal(f.image, render(moved).image)


def test_exact_flow_leads_to_the_same_surface():
    """Read the second frame where the flow leads: colours agree but where something hides, or light and shadow move."""
    g = torch.Generator().manual_seed(3)
    a = random_scenes(24, g)
    still = torch.zeros(24, 3, 2)
    for velocity, camera in ((still, torch.tensor([0.15, 0.1])), (still + torch.tensor([0.1, -0.2]), torch.zeros(2))):
        b = toyworld.moved(a, velocity, camera.expand(24, 2), 1.0)
        first, second = render(a), render(b)
        flow = toyworld.flow_between(a, b, first)
        same = warp.backwarp(second.segments[:, None].float(), flow).round()[:, 0] == first.segments
        error = (warp.backwarp(second.image, flow) - first.image).abs().mean(1)
        assert same.float().mean() > 0.93
        assert error[same].median() < 0.004 and error[same & (first.segments > 0)].median() < 0.01
        naive = (second.image - first.image).abs().mean(1)
        assert error[same & (first.segments > 0)].mean() < 0.3 * naive[same & (first.segments > 0)].mean()


def test_flow_is_none_where_nothing_moves_and_follows_the_camera():
    a = random_scenes(4, torch.Generator().manual_seed(3))
    frames = render(a)
    assert toyworld.flow_between(a, a, frames).abs().max() < 1e-3
    aside = toyworld.moved(a, torch.zeros(4, 3, 2), torch.tensor([[0.2, 0.0]]), 1.0)
    flow = toyworld.flow_between(a, aside, frames)
    torch.testing.assert_close(flow[:, 0], -0.2 * 128 / frames.depth, atol=4e-2, rtol=1e-3)  # parallax
    assert flow[:, 1].abs().max() < 1e-3


def test_captions_name_what_is_there():
    g = torch.Generator().manual_seed(0)
    scenes = random_scenes(300, g)
    named = 0
    for i, text in enumerate(captions(scenes, g)):
        ground, time = GROUNDS[scenes.ground[i]], TIMES[scenes.time[i]]
        assert ground in text or time in text
        for k in range(3):
            if scenes.kind[i, k] >= 0:
                named += f"{COLOURS[scenes.colour[i, k]]} {KINDS[scenes.kind[i, k]]}" in text
        for other in set(GROUNDS) - {ground}:
            assert other not in text
    assert named > 0.8 * (scenes.kind >= 0).sum()


def test_pictures_are_in_range_and_objects_visible():
    f = render(random_scenes(64, torch.Generator().manual_seed(9)))
    assert f.image.min() >= 0 and f.image.max() <= 1 and f.image.isfinite().all()
    assert ((f.segments > 0).flatten(1).float().mean(1) > 0.005).all()
    assert toyworld.PART.shape == (len(KINDS), toyworld.MAX_PARTS, 7)


def edited_by_hand(n, seed):
    """n scenes, their pictures before, random edits, the truth after (Frames), and the coarse edits (n, H, W, 4)."""
    g = torch.Generator().manual_seed(seed)
    scenes = random_scenes(n, g)
    before = render(scenes)
    edited, edits = toyworld.random_edits(scenes, g)
    images = (before.image * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pieces = [toyworld.pieces(edited[i : i + 1], edits[i], before.segments[i]) for i in range(n)]
    coarse = [torch.from_numpy(collage.composite(image, p)) for image, p in zip(images, pieces)]
    return scenes, before, edited, edits, render(edited), torch.stack(coarse)


def test_edits_depend_on_the_generator_alone():
    a, b, c = (edited_by_hand(12, seed) for seed in (1, 1, 2))
    assert torch.equal(a[4].image, b[4].image) and torch.equal(a[5], b[5])
    assert [e.verb for e in a[3]] == [e.verb for e in b[3]] and not torch.equal(a[4].image, c[4].image)


def test_what_is_dragged_looks_as_it_truly_does():
    """Shading is the object's own: wherever a coarse edit and the truth show the same object, they agree."""
    _, before, edited, edits, after, coarse = edited_by_hand(90, 0)
    truth = (after.image * 255).permute(0, 2, 3, 1)
    assert {e.verb for e in edits} == set(toyworld.VERBS)
    for verb in ("move", "scale", "duplicate"):
        errors, shown = [], 0
        for i in (i for i, e in enumerate(edits) if e.verb == verb):
            k = edits[i].k if verb != "duplicate" else edited.kind.shape[1] - 1
            mask = before.segments[i] == edits[i].k + 1
            piece, where = collage.lay(coarse[i, ..., :3].numpy(), mask.numpy(), edits[i].matrix.numpy())
            cover = torch.zeros(128, 128)
            cover[where] = torch.from_numpy(piece[..., 3])
            covered = -torch.nn.functional.max_pool2d(-cover[None], 3, 1, 1)[0] > 254  # a pixel off its outline
            inside = covered & (after.segments[i] == k + 1)
            errors.append((coarse[i, ..., :3][inside] - truth[i][inside]).square())
            shown += (inside.sum() / (after.segments[i] == k + 1).sum()).item()
        psnr = 10 * math.log10(255**2 / torch.cat(errors).mean())
        assert psnr > 40 and shown / len(errors) > 0.65  # the rest was hidden, or is outline


def test_deleting_leaves_a_hole_and_nothing_else_changes():
    _, before, _, edits, _, coarse = edited_by_hand(40, 3)
    for i in (i for i, e in enumerate(edits) if e.verb == "delete"):
        hole = before.segments[i] == edits[i].k + 1
        assert hole.any() and torch.equal(coarse[i, ..., 3] == 0, hole)
        image = (before.image[i] * 255).round().byte().permute(1, 2, 0)
        assert torch.equal(coarse[i, ..., :3][~hole], image[~hole])
    for i in (i for i, e in enumerate(edits) if e.verb == "duplicate"):
        assert (coarse[i, ..., 3] == 255).all()


def test_edited_objects_are_seen():
    scenes, _, edited, edits, after, _ = edited_by_hand(120, 4)
    K = scenes.kind.shape[1]
    change = [{"duplicate": 1, "delete": -1}.get(e.verb, 0) for e in edits]
    assert ((edited.kind >= 0).sum(1) - (scenes.kind >= 0).sum(1)).tolist() == change
    slot = torch.tensor([K if e.verb == "duplicate" else e.k for e in edits])[:, None]
    there = torch.tensor([e.verb != "delete" for e in edits])
    alone = dataclasses.replace(edited, kind=edited.kind.where(torch.arange(K + 1) == slot, -1))
    seen = (after.segments == slot[..., None] + 1).sum((1, 2)) / (render(alone).segments > 0).sum((1, 2))
    assert seen[there].min() > 0.05 and (seen[there] < 0.5).float().mean() < 0.05  # hidden at times, but never wholly
    x, z = (field.gather(1, slot)[there] for field in (edited.x, edited.z))
    assert ((x / z).abs() < 0.45).all() and (z >= 2.1).all() and (z <= 4.6).all()
