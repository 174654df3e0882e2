"""toy/world.py: the toy world keeps the promises that its pictures are judged by."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import data
import warp
from tests.toy import scene, seeded
from toy import captions as toy_captions
from toy import clips, motion, world
from toy.clips import Clip
from toy.world import COLOURS, GROUNDS, KINDS, TIMES, captions, random_scenes, render
from video.batches import ShardPairs

# --- Random scenes --------------------------------------------------------------------------------


def test_same_seed_same_pictures_and_captions():
    def draw(seed):
        g = seeded(seed)
        scenes = random_scenes(6, g)
        return render(scenes).image, captions(scenes, g)

    a, b, c = draw(1), draw(1), draw(2)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert not torch.equal(a[0], c[0]) and a[1] != c[1]


def test_a_new_kind_changes_no_old_scene(monkeypatch):
    old = random_scenes(200, seeded(0))
    monkeypatch.setattr(world, "KINDS", (*KINDS, "snowman"))
    same, new = random_scenes(200, seeded(0)), random_scenes(200, seeded(0), kinds=7)
    for field in dataclasses.fields(old):
        assert torch.equal(getattr(old, field.name), getattr(same, field.name))
        if field.name != "kind":
            assert torch.equal(getattr(old, field.name), getattr(new, field.name))
    assert old.kind.max() == 5 and new.kind.max() == 6
    assert torch.equal(old.kind >= 0, new.kind >= 0)


def test_plain_captions_name_everything_and_an_empty_scene_its_place():
    scenes = random_scenes(40, seeded(1))
    count = (scenes.kind >= 0).sum(1)
    for i, text in enumerate(toy_captions.caption_scenes(scenes)):
        assert text.count("a ") == count[i] and TIMES[scenes.time[i]] in text
        assert (" and " in text) == (count[i] > 1) and text.count(",") == max(0, count[i] - 2)
    scenes.kind[:] = -1
    assert toy_captions.caption_scenes(scenes)[0].split(" at ")[0] in GROUNDS


def test_scores_are_read_as_the_scenes_that_they_stand_for():
    """The loss is zero, and the words right, for scores that are sure of the truth."""
    scenes = random_scenes(30, seeded(2))
    time, ground, kind, colour = toy_captions.read_scenes(scenes)
    sizes = len(TIMES), len(GROUNDS), len(KINDS) + 1, len(COLOURS)
    sure = [30.0 * torch.nn.functional.one_hot(x, n).flatten(1) for x, n in zip((time, ground, kind, colour), sizes)]
    scores = torch.cat(sure, 1)
    assert scores.shape[1] == sum(toy_captions.SIZES) and toy_captions.caption_loss(scores, scenes) < 1e-6
    sees = SimpleNamespace(embed=lambda x: scores, projection=torch.nn.Linear(1, 1))
    assert toy_captions.describe(sees, torch.zeros(30, 3, 8, 8)) == toy_captions.caption_scenes(scenes)


def test_captions_name_what_is_there():
    g = seeded(0)
    scenes = random_scenes(300, g)
    named = 0
    for i, text in enumerate(captions(scenes, g)):
        ground, time = GROUNDS[scenes.ground[i]], TIMES[scenes.time[i]]
        assert ground in text or time in text
        for k in range(3):
            if scenes.kind[i, k] >= 0:
                thing = f"{COLOURS[scenes.colour[i, k]]} {KINDS[scenes.kind[i, k]]}"
                named += thing in text
        for other in set(GROUNDS) - {ground}:
            assert other not in text
    assert named > 0.8 * (scenes.kind >= 0).sum()


# --- Drawing --------------------------------------------------------------------------------------


def test_a_scene_looks_the_same_in_any_batch():
    scenes = random_scenes(8, seeded(0))
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
    width = (columns.max() - columns.min() + 1) / 256
    assert width == pytest.approx(0.8 / 4, abs=0.01)  # a ball is one size wide


def test_nearer_objects_hide_farther_ones_and_depth_agrees():
    s = scene(kind=("box", "ball"), colour=("red", "blue"), x=(0.0, 0.0), z=(4.0, 2.5), size=(0.8, 0.8))
    f = render(s)
    box, ball = f.segments[0] == 1, f.segments[0] == 2
    assert box.any() and ball.any()
    assert (f.depth[0][ball] == 2.5).all() and (f.depth[0][box] == 4.0).all()
    assert f.depth[0, 0, 0] == math.inf
    alone = render(dataclasses.replace(s, kind=torch.tensor([[KINDS.index("box"), -1]])))
    assert (box.sum() < (alone.segments == 1).sum()).item()


def find_shadow(s, size=256):
    """-> (size, size) bool, where the ground is darker for the objects that stand on it"""
    with_it, without = render(s, size), render(dataclasses.replace(s, kind=torch.full_like(s.kind, -1)), size)
    return ((without.image - with_it.image).mean(1)[0] > 0.04) & (with_it.segments[0] == 0)


@pytest.mark.parametrize("sun", [0.7, -0.7, math.pi - 0.7, math.pi + 0.7])
def test_shadows_fall_away_from_the_light(sun):
    darker = find_shadow(scene(sun=sun, z=(3.0,)))
    rows, columns = darker.nonzero().T.float() / 256
    assert darker.sum() > 200
    assert math.copysign(1, columns.mean() - 0.5) == -math.copysign(1, math.sin(sun))
    foot = 0.42 + 1 / 3
    # Light ahead: towards the camera
    assert math.copysign(1, rows.mean() - foot) == math.copysign(1, math.cos(sun))
    assert (rows > 0.42).all()


def test_all_parts_of_a_figure_cast_shadows(monkeypatch):
    snowman = [(world.ROUND, 0.0, 0.3, 0.3, 0.3, 0.0, world.OWN, world.CASTS),
               (world.ROUND, 0.0, 0.8, 0.2, 0.2, 0.0, world.OWN, world.CASTS),
               (world.TURNED, 0.0, 1.2, 0.4, 0.2, 0.0, world.DARK, world.CASTS)]  # a broad hat
    buttons = [(*part[:7], world.INSIDE) for part in snowman[:2]] + snowman[2:]

    def shadow(parts):
        monkeypatch.setattr(world, "PART", world.pack_parts(world.PARTS | {"ball": parts}))
        return find_shadow(scene(sun=0.3, z=(3.5,)))

    whole, hatless, hat = shadow(snowman), shadow(snowman[:2]), shadow(buttons)
    assert (whole & ~hatless).sum() > 100  # the third part's own
    assert (whole & hat).sum() > 100 and (whole & ~hat).sum() > 100  # what is INSIDE casts none
    assert not (hat & ~whole).any()


def test_water_reflects_and_dry_ground_does_not():
    for ground, reflects in (("water", True), ("snow", False)):
        s = scene(ground, z=(3.0,), sun=math.pi + 0.5)  # light from behind: no shadow below the foot
        empty = dataclasses.replace(s, kind=torch.tensor([[-1]]))
        below = int((0.42 + 1 / 3 + 0.06) * 256)
        change = (render(s, 256).image - render(empty, 256).image)[0, :, below, 128]
        assert (change[0] - change[2] > 0.15).item() is reflects  # redder below the ball


# --- Motion ---------------------------------------------------------------------------------------


def test_exact_flow_leads_to_the_same_surface():
    """Read the second frame where the flow leads: colours agree but where something hides, or light
    and shadow move."""
    a = random_scenes(24, seeded(3))
    still = torch.zeros(24, 3, 2)
    aside, away = torch.tensor([0.15, 0.1]), torch.tensor([0.1, -0.2])
    for velocity, camera in ((still, aside), (still + away, torch.zeros(2))):
        b = motion.move(a, velocity, camera.expand(24, 2), 1.0)
        first, second = render(a), render(b)
        flow = motion.flow_between(a, b, first)
        there = warp.backwarp(second.segments[:, None].float(), flow).round()[:, 0]
        same = there == first.segments
        error = (warp.backwarp(second.image, flow) - first.image).abs().mean(1)
        objects = same & (first.segments > 0)
        assert same.float().mean() > 0.93
        assert error[same].median() < 0.004 and error[objects].median() < 0.01
        naive = (second.image - first.image).abs().mean(1)
        assert error[objects].mean() < 0.3 * naive[objects].mean()


def test_flow_composed_of_ten_steps_is_the_exact_one():
    s = random_scenes(16, seeded(7))
    velocity = torch.randn(16, 3, 2, generator=seeded(8)) * 0.4
    camera = torch.randn(16, 2, generator=seeded(9)) * 0.2
    at = [motion.move(s, velocity, camera, i / 10) for i in range(11)]
    frames = [render(scenes) for scenes in at]
    flow = motion.flow_between(at[0], at[1], frames[0])
    for i in range(1, 10):
        flow = warp.compose_flow(flow, motion.flow_between(at[i], at[i + 1], frames[i]))
    exact = motion.flow_between(at[0], at[10], frames[0])
    error = (flow - exact).norm(dim=1)
    assert error[error.isfinite()].quantile(0.9) < 0.01


# --- Clips ----------------------------------------------------------------------------------------


def test_a_house_turns_and_its_door_goes_round():
    def door(turn):
        """Columns of the door, from the house's middle"""
        frames = render(scene(kind=("house",), colour=("white",), turn=turn))
        house = frames.segments[0] > 0
        rows, columns = house.nonzero().T
        walls = house & (torch.arange(128) > rows.float().mean() + 4)[:, None]
        return (walls & (frames.image[0].sum(0) < 1.0)).nonzero()[:, 1] - columns.float().mean()

    left, middle, right, away = (door(turn) for turn in (0.0, -world.YAW, -2 * world.YAW, math.pi))
    assert left.mean() < -2 and middle.mean().abs() < 1 and right.mean() > 2
    assert len(away) == 0


def test_a_box_seen_aslant_is_wider_and_looks_the_same_after_a_quarter_turn():
    turns = [turn - world.YAW for turn in (0, math.pi / 4, math.pi / 2)]
    front, aslant, again = (render(scene(kind=("box",), turn=turn)) for turn in turns)
    assert aslant.segments[0].any(0).sum() > 1.3 * front.segments[0].any(0).sum()
    assert (front.image - again.image).abs().max() < 1e-3


def test_what_is_lifted_leaves_its_shadow_on_the_ground():
    before, after = (scene(lift=lift) for lift in (0.0, 0.6))
    rows = [(render(s).segments[0] > 0).nonzero()[:, 0].float().mean() for s in (before, after)]
    assert (rows[0] - rows[1]).item() == pytest.approx(128 * 0.6 / 3.0, abs=1)
    foot = int((0.42 + 1 / 3.0) * 256)
    assert find_shadow(after)[foot:].sum() > 100


def test_the_lens_zooms_about_the_middle_and_pans():
    near, wide = render(scene(zoom=math.log(2))).image, render(scene(), 256).image
    assert (near - wide[:, :, 64:192, 64:192]).abs().mean() < 0.002
    aside, still = render(scene(pan=(10 / 128, 0.0))).image, render(scene()).image
    assert (aside[..., :-10] - still[..., 10:]).abs().mean() < 0.002


def test_what_is_out_of_focus_has_soft_edges():
    def steepest(focus):
        return render(scene(aperture=0.2, focus=focus)).image[0, :, 80].diff(dim=1).abs().sum(0).max()

    assert steepest(1 / 3 + 0.3) < 0.5 * steepest(1 / 3)


def test_clips_depend_on_the_seed_and_everything_in_them_moves():
    a, b = (Clip(32, seeded(5)) for _ in "ab")
    first, same, later = a(0.2), b(0.2), a(0.6)
    names = {field.name for field in dataclasses.fields(first)}
    assert all(torch.equal(getattr(first, name), getattr(same, name)) for name in names)
    fixed = {"ground", "time", "horizon", "texture", "kind", "colour", "aperture", "focus"}
    assert {name for name in names if (getattr(first, name) != getattr(later, name)).any()} == names - fixed
    assert (render(later).image != render(first).image).flatten(1).any(1).all()


def test_clips_become_pairs_for_magic_fixup(tmp_path):
    """Written, found, cut into pairs by data.py's own rules; and written once only."""
    clips.main([str(tmp_path / "clips"), "--count", "3", "--size", "64"])
    files = sorted(p.relative_to(tmp_path / "clips") for p in (tmp_path / "clips").rglob("*.png"))
    assert len(files) == 3 * clips.FRAMES and str(files[0]) == "00000/00.png"
    before = (tmp_path / "clips/00002/20.png").stat().st_mtime_ns
    clips.main([str(tmp_path / "clips"), "--count", "4", "--size", "64"])
    assert (tmp_path / "clips/00002/20.png").stat().st_mtime_ns == before
    assert {p.name for p in tmp_path.iterdir()} == {"clips"}
    folders = [str(tmp_path / "clips"), "--out", str(tmp_path / "pairs")]
    data.main([*folders, "--size", "64", "--pairs", "2", "--fps", "6.67"])
    pairs = list(ShardPairs(tmp_path / "pairs", epochs=1))
    assert len(pairs) >= 4 and all((pair["reference"] - pair["target"]).abs().mean() > 0.01 for pair in pairs)
