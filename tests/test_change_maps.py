"""editing/change_maps.py: transforms by value, what a spec says, segments into maps by a fake network."""

import cv2
import numpy as np
import pytest
import torch

from editing import change_maps
from editing.change_maps import (
    TRANSFORMS,
    Spec,
    compute_map,
    depth_to_map,
    equalize,
    gamma,
    invert,
    parse_spec,
    quantize,
    window,
)
from networks import midas, sam

# --- Transforms -----------------------------------------------------------------------------------


def some_depth():
    return torch.rand(31, 45, generator=torch.Generator().manual_seed(0)) ** 3 * 40 - 2


def test_depth_to_map_spans_the_depths():
    d = some_depth()
    mu = depth_to_map(d)
    assert mu.min() == 0 and mu.max() == 1 and torch.equal(mu.flatten().argsort(), d.flatten().argsort())
    assert torch.allclose(depth_to_map(3 * d + 7), mu, atol=1e-6)  # the unknown scale and shift do not matter
    assert torch.equal(depth_to_map(torch.full((3, 4), 5.0)), torch.ones(3, 4))


def test_transforms_by_value():
    mu = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
    expected = {
        invert: ((), [1, 0.9, 0.75, 0.5, 0.25, 0]),
        gamma: ((2,), [0, 0.01, 0.0625, 0.25, 0.5625, 1]),
        window: ((0.25, 0.75), [0, 0, 0, 0.5, 1, 1]),
        equalize: ((), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        quantize: ((3,), [0, 0, 0, 0.5, 1, 1]),
    }
    assert set(expected) == {transform for transform, *_ in TRANSFORMS.values()}
    for transform, (arguments, want) in expected.items():
        assert torch.allclose(transform(mu, *arguments), torch.tensor(want, dtype=mu.dtype), atol=1e-6), transform


def test_equalize_flattens_the_histogram():
    mu = equalize(depth_to_map(some_depth()))
    counts = mu.histc(10, 0, 1) / mu.numel()
    assert (counts - 0.1).abs().max() < 0.01
    assert torch.allclose(equalize(mu), mu, atol=1e-6)
    flat = torch.full((5, 6), 0.3)
    assert torch.equal(equalize(flat), flat)
    ties = torch.tensor([0.2, 0.2, 0.7, 0.7, 0.7, 0.9])
    assert torch.allclose(equalize(ties), torch.tensor([0, 0, 0.4, 0.4, 0.4, 1]))


# --- Specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, spec", {
    "depth": Spec("midas"),
    "depth:invert": Spec("midas", (("invert", ()),)),
    "depth:equalize, gamma=.5,window=0.2-0.8,invert,quantize=4": Spec("midas", (
        ("equalize", ()), ("gamma", (0.5,)), ("window", (0.2, 0.8)), ("invert", ()), ("quantize", (4,)))),
    "sam:310,200=0": Spec("sam", clicks=((310, 200, 0),)),
    "sam:310.5,200=0; 50 , 80 = 0.4 ;rest=0.9": Spec("sam", clicks=((310.5, 200, 0), (50, 80, 0.4)), rest=0.9),
    "sam:rest=0;1,2=1": Spec("sam", clicks=((1, 2, 1),), rest=0),
    "sam:0": Spec("sam", values=(0,)),
    "sam:0, 0.3,1": Spec("sam", values=(0, 0.3, 1)),
}.items())  # fmt: skip
def test_specs(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize("name", ["", "depth.png", "./depth", "./sam:0", "maps/depth", "Depth", "depths", "a:b"])
def test_everything_else_is_a_file(name):
    assert parse_spec(name) is None


# --- Segments into maps, by a fake network --------------------------------------------------------


PICTURE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)


def disc(x, y, r, size=(60, 100)):
    return np.hypot(*np.ogrid[0.5 - y:size[0] - y, 0.5 - x:size[1] - x]) < r


def fake_segmenter(image, at):
    assert np.array_equal(image, PICTURE)
    return disc(*at, 10)


def test_clicks_lie_over_each_other_as_they_come():
    mu = compute_map(parse_spec("sam:30,30=0;36,30=0.25;80,20=1;rest=0.75"), PICTURE, None, segment_at=fake_segmenter)
    first, second, third = disc(30, 30, 10), disc(36, 30, 10), disc(80, 20, 10)
    assert mu.dtype == torch.float32 and mu.shape == (60, 100) and (first & second).any()
    want = np.select([third, second, first], [1, 0.25, 0], 0.75)
    assert np.array_equal(mu.numpy(), want)


def test_what_is_not_mentioned_is_kept_whatever_white_means():
    for white, mentioned in ((False, 0.25), (True, 0.75)):
        mu = compute_map(parse_spec("sam:30,30=0.25"), PICTURE, None, white, fake_segmenter)
        assert np.array_equal(mu.numpy(), np.where(disc(30, 30, 10), mentioned, 1))
    mu = compute_map(parse_spec("sam:30,30=0.25;rest=1"), PICTURE, None, True, fake_segmenter)
    assert np.array_equal(mu.numpy(), np.where(disc(30, 30, 10), 0.75, 0))


def test_clicks_that_hit_nothing():
    for text in ("sam:99,59=0;100,5=0", "sam:5,60=0"):
        with pytest.raises(ValueError, match="outside the picture of 100x60"):  # before anything is computed
            compute_map(parse_spec(text), PICTURE, None, segment_at=pytest.fail)
    with pytest.raises(ValueError, match="nothing at the click 7,8"):
        compute_map(parse_spec("sam:7,8=0"), PICTURE, None, segment_at=lambda image, at: np.zeros((60, 100), bool))


@pytest.fixture
def fake_masks(monkeypatch):
    """Automatic masks of three discs, the second the largest and the third within it, at whatever size is asked for."""
    seen = []

    def masks(model, image):
        seen.append(image)
        H, W = image.shape[:2]
        found = [disc(0.8 * W, 0.5 * H, 0.1 * W, (H, W)), disc(0.3 * W, 0.5 * H, 0.25 * W, (H, W)),
                 disc(0.3 * W, 0.5 * H, 0.05 * W, (H, W))]
        return [{"segmentation": mask, "area": int(mask.sum())} for mask in found]

    monkeypatch.setattr(change_maps, "automatic_masks", masks)
    return seen


def test_automatic_masks_take_values_from_the_largest_on(fake_masks, recwarn):
    model = sam.SAM(sam.CONFIGS["toy"])
    mu = compute_map(parse_spec("sam:0,0.5"), PICTURE, model).numpy()
    largest, second = disc(30, 30, 25), disc(80, 30, 10)
    assert np.array_equal(mu, np.select([second, largest], [0.5, 0], 1))  # the third, within the first, has its value
    mu = compute_map(parse_spec("sam:0,0.5,0.75"), PICTURE, model).numpy()
    assert np.array_equal(mu, np.select([disc(30, 30, 5), second, largest], [0.75, 0.5, 0], 1))
    assert not recwarn.list
    four = compute_map(parse_spec("sam:0,0.5,0.75,0.2"), PICTURE, model).numpy()
    assert np.array_equal(four, mu) and "4 values" in str(recwarn.pop().message)


def test_a_large_photo_is_segmented_at_the_networks_size(fake_masks):
    """And its masks are those of a small one, enlarged."""
    large = cv2.resize(PICTURE, (1000, 600))
    mu = compute_map(parse_spec("sam:0"), large, sam.SAM(sam.CONFIGS["toy"])).numpy()
    assert fake_masks[0].shape == (77, 128, 3) and mu.shape == (600, 1000)
    assert ((mu == 0) != disc(300, 300, 250, (600, 1000))).mean() < 0.01


def test_no_masks_at_all(monkeypatch):
    monkeypatch.setattr(change_maps, "automatic_masks", lambda *_: [])
    with pytest.raises(ValueError, match="no masks"):
        compute_map(parse_spec("sam:0"), PICTURE, sam.SAM(sam.CONFIGS["toy"]))


def test_depth_is_transformed_from_left_to_right(monkeypatch):
    d = some_depth()
    monkeypatch.setattr(midas, "depth", lambda model, image: d)
    mu = compute_map(parse_spec("depth:gamma=2,invert"), None, None)
    assert torch.equal(mu, 1 - depth_to_map(d) ** 2)
    assert torch.equal(compute_map(parse_spec("depth:invert,gamma=2"), None, None), (1 - depth_to_map(d)) ** 2)
    assert torch.equal(compute_map(parse_spec("depth"), None, None, True), 1 - depth_to_map(d))
    d[3, 4] = torch.inf
    with pytest.raises(ValueError, match="--precision fp32"):
        compute_map(parse_spec("depth"), None, None)
