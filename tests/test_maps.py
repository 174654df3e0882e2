"""change_maps.py: transforms, specs, segments into maps; and the command line with a small random SAM and MiDaS."""

import functools
import gc
import json
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sd
from checkpoints import published
from editing import change_maps as maps
from networks import midas, sam
from tests import midas_file
from tests.runs import MEADOW, fails, run

CLICK = "sam:40,60=0;90,30=0.5"


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def some_depth():
    return torch.rand(31, 45, generator=torch.Generator().manual_seed(0)) ** 3 * 40 - 2


def test_change_map_spans_the_depths():
    d = some_depth()
    mu = maps.change_map(d)
    assert mu.min() == 0 and mu.max() == 1 and torch.equal(mu.flatten().argsort(), d.flatten().argsort())
    assert torch.allclose(maps.change_map(3 * d + 7), mu, atol=1e-6)  # the unknown scale and shift do not matter
    assert torch.equal(maps.change_map(torch.full((3, 4), 5.0)), torch.ones(3, 4))


def test_transforms_by_value():
    mu = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
    expected = {
        maps.invert: ((), [1, 0.9, 0.75, 0.5, 0.25, 0]),
        maps.gamma: ((2,), [0, 0.01, 0.0625, 0.25, 0.5625, 1]),
        maps.window: ((0.25, 0.75), [0, 0, 0, 0.5, 1, 1]),
        maps.equalize: ((), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        maps.quantize: ((3,), [0, 0, 0, 0.5, 1, 1]),
    }
    assert set(expected) == set(maps.TRANSFORMS.values())
    for transform, (arguments, want) in expected.items():
        assert torch.allclose(transform(mu, *arguments), torch.tensor(want, dtype=mu.dtype), atol=1e-6), transform


def test_transforms_keep_the_order_the_range_and_the_shape():
    mu = maps.change_map(some_depth())[None, None]
    order = mu.flatten().argsort()
    for transform, arguments in ((maps.gamma, (0.4,)), (maps.window, (0.2, 0.3)), (maps.equalize, ()),
                                 (maps.quantize, (4,))):
        new = transform(mu, *arguments)
        assert new.shape == mu.shape and new.dtype == mu.dtype and new.min() == 0 and new.max() == 1
        assert (new.flatten()[order].diff() >= 0).all()
    assert torch.allclose(maps.invert(maps.invert(mu)), mu, atol=1e-6)


def test_equalize_flattens_the_histogram():
    mu = maps.equalize(maps.change_map(some_depth()))
    counts = mu.histc(10, 0, 1) / mu.numel()
    assert (counts - 0.1).abs().max() < 0.01
    assert torch.allclose(maps.equalize(mu), mu, atol=1e-6)
    flat = torch.full((5, 6), 0.3)
    assert torch.equal(maps.equalize(flat), flat)
    ties = torch.tensor([0.2, 0.2, 0.7, 0.7, 0.7, 0.9])
    assert torch.allclose(maps.equalize(ties), torch.tensor([0, 0, 0.4, 0.4, 0.4, 1]))


def test_quantize_has_that_many_levels():
    mu = maps.quantize(maps.equalize(maps.change_map(some_depth())), 4)
    values, counts = mu.unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert (counts / mu.numel() - 0.25).abs().max() < 0.01  # after equalize, equal areas


def test_transforms_refuse():
    mu = torch.zeros(2, 2)
    for transform, arguments in ((maps.gamma, (0,)), (maps.window, (0.5, 0.5)), (maps.quantize, (1,))):
        with pytest.raises(ValueError):
            transform(mu, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Specs


@pytest.mark.parametrize("text, spec", {
    "depth": maps.Spec("midas"),
    "depth:invert": maps.Spec("midas", (("invert", ()),)),
    "depth:equalize, gamma=.5,window=0.2-0.8,invert,quantize=4": maps.Spec("midas", (
        ("equalize", ()), ("gamma", (0.5,)), ("window", (0.2, 0.8)), ("invert", ()), ("quantize", (4,)))),
    "sam:310,200=0": maps.Spec("sam", clicks=((310, 200, 0),)),
    "sam:310.5,200=0; 50 , 80 = 0.4 ;rest=0.9": maps.Spec("sam", clicks=((310.5, 200, 0), (50, 80, 0.4)), rest=0.9),
    "sam:rest=0;1,2=1": maps.Spec("sam", clicks=((1, 2, 1),), rest=0),
    "sam:0": maps.Spec("sam", values=(0,)),
    "sam:0, 0.3,1": maps.Spec("sam", values=(0, 0.3, 1)),
}.items())  # fmt: skip
def test_specs(text, spec):
    assert maps.parse(text) == spec


@pytest.mark.parametrize("name", ["", "depth.png", "./depth", "./sam:0", "maps/depth", "Depth", "depths", "a:b"])
def test_everything_else_is_a_file(name):
    assert maps.parse(name) is None


@pytest.mark.parametrize("text, said", {
    "depth:": "'' is no transform",
    "depth:invert,": "'' is no transform",
    "depth:flip": "'flip' is no transform",
    "depth:gamma": "'gamma' is no transform",
    "depth:gamma=0": "above 0",
    "depth:gamma=-1": "'gamma=-1' is no transform",
    "depth:gamma=nan": "no transform",
    "depth:invert=1": "no transform",
    "depth:window=0.8-0.2": "lower value to a higher one",
    "depth:window=0.2": "no transform",
    "depth:quantize=1": "two levels",
    "depth:quantize=2.5": "no transform",
    "depth:quantize=" + 400 * "9": "no transform",
    "depth:invert;equalize": "no transform",
    "depth:map.png": "no transform",
    "sam": "'' is no value",
    "sam:": "'' is no value",
    "sam:0,": "'' is no value",
    "sam:0;1": "no value",
    "sam:1.5": "'1.5' is no value",
    "sam:-1": "no value",
    "sam:1e-1": "no value",
    "sam:nan": "no value",
    "sam:3=1": "'3' is no point",
    "sam:3,4": "'3' is no value",
    "sam:3,4=": "'' is no value",
    "sam:3,4=2": "'2' is no value",
    "sam:3,4=1;": "'' is no point",
    "sam:3,4,5=1": "no point",
    "sam:-3,4=1": "no point",
    "sam:3,4=1,5,6=0": "no value",
    "sam:rest=0": "one click",
    "sam:3,4=1;rest=0;rest=1": "at most one rest",
    "sam:3,4=1;rest=x": "'x' is no value",
}.items())  # fmt: skip
def test_a_malformed_spec_is_told_with_a_right_one(text, said):
    with pytest.raises(ValueError) as e:
        maps.parse(text)
    assert said in str(e.value) and text in str(e.value) and "\n" not in str(e.value)
    assert maps.RIGHT[text.partition(":")[0]] in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Segments into maps, by a fake network


PICTURE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)


def disc(x, y, r, size=(60, 100)):
    return np.hypot(*np.ogrid[0.5 - y:size[0] - y, 0.5 - x:size[1] - x]) < r


def fake_segmenter(image, at):
    assert np.array_equal(image, PICTURE)
    return disc(*at, 10)


def test_clicks_lie_over_each_other_as_they_come():
    mu = maps.compute(maps.parse("sam:30,30=0;36,30=0.25;80,20=1;rest=0.75"), PICTURE, None, segment_at=fake_segmenter)
    first, second, third = disc(30, 30, 10), disc(36, 30, 10), disc(80, 20, 10)
    assert mu.dtype == torch.float32 and mu.shape == (60, 100) and (first & second).any()
    want = np.select([third, second, first], [1, 0.25, 0], 0.75)
    assert np.array_equal(mu.numpy(), want)


def test_what_is_not_mentioned_is_kept_whatever_white_means():
    for white, mentioned in ((False, 0.25), (True, 0.75)):
        mu = maps.compute(maps.parse("sam:30,30=0.25"), PICTURE, None, white, fake_segmenter)
        assert np.array_equal(mu.numpy(), np.where(disc(30, 30, 10), mentioned, 1))
    mu = maps.compute(maps.parse("sam:30,30=0.25;rest=1"), PICTURE, None, True, fake_segmenter)
    assert np.array_equal(mu.numpy(), np.where(disc(30, 30, 10), 0.75, 0))


def test_clicks_that_hit_nothing():
    for text in ("sam:99,59=0;100,5=0", "sam:5,60=0"):
        with pytest.raises(ValueError, match="outside the picture of 100x60"):  # before anything is computed
            maps.compute(maps.parse(text), PICTURE, None, segment_at=pytest.fail)
    with pytest.raises(ValueError, match="nothing at the click 7,8"):
        maps.compute(maps.parse("sam:7,8=0"), PICTURE, None, segment_at=lambda image, at: np.zeros((60, 100), bool))


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

    monkeypatch.setattr(maps, "automatic_masks", masks)
    return seen


def test_automatic_masks_take_values_from_the_largest_on(fake_masks, recwarn):
    model = sam.SAM(sam.CONFIGS["toy"])
    mu = maps.compute(maps.parse("sam:0,0.5"), PICTURE, model).numpy()
    largest, second = disc(30, 30, 25), disc(80, 30, 10)
    assert np.array_equal(mu, np.select([second, largest], [0.5, 0], 1))  # the third, within the first, has its value
    mu = maps.compute(maps.parse("sam:0,0.5,0.75"), PICTURE, model).numpy()
    assert np.array_equal(mu, np.select([disc(30, 30, 5), second, largest], [0.75, 0.5, 0], 1))
    assert not recwarn.list
    four = maps.compute(maps.parse("sam:0,0.5,0.75,0.2"), PICTURE, model).numpy()
    assert np.array_equal(four, mu) and "4 values" in str(recwarn.pop().message)


def test_a_large_photo_is_segmented_at_the_networks_size(fake_masks):
    """And its masks are those of a small one, enlarged."""
    large = cv2.resize(PICTURE, (1000, 600))
    mu = maps.compute(maps.parse("sam:0"), large, sam.SAM(sam.CONFIGS["toy"])).numpy()
    assert fake_masks[0].shape == (77, 128, 3) and mu.shape == (600, 1000)
    assert ((mu == 0) != disc(300, 300, 250, (600, 1000))).mean() < 0.01


def test_no_masks_at_all(monkeypatch):
    monkeypatch.setattr(maps, "automatic_masks", lambda *_: [])
    with pytest.raises(ValueError, match="no masks"):
        maps.compute(maps.parse("sam:0"), PICTURE, sam.SAM(sam.CONFIGS["toy"]))


def test_depth_is_transformed_from_left_to_right(monkeypatch):
    d = some_depth()
    monkeypatch.setattr(midas, "depth", lambda model, image: d)
    mu = maps.compute(maps.parse("depth:gamma=2,invert"), None, None)
    assert torch.equal(mu, 1 - maps.change_map(d) ** 2)
    assert torch.equal(maps.compute(maps.parse("depth:invert,gamma=2"), None, None), (1 - maps.change_map(d)) ** 2)
    assert torch.equal(maps.compute(maps.parse("depth"), None, None, True), 1 - maps.change_map(d))
    d[3, 4] = torch.inf
    with pytest.raises(ValueError, match="--precision fp32"):
        maps.compute(maps.parse("depth"), None, None)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, with files in their published layouts under their published names


def small_sam():
    """A random one, tuned until its masks are neither empty nor full, differ by click, and are what it believes in."""
    torch.manual_seed(0)
    model = sam.SAM(sam.CONFIGS["toy"]).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if "pos" in name:
            p.copy_(0.5 * torch.randn(p.shape))
        elif "norm" not in name and p.ndim > 1:
            p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5)
    decoder, last = model.mask_decoder, model.image_encoder.neck[3]
    last.weight *= 0.3
    for layer in decoder.transformer.layers:
        attention = layer.cross_attn_image_to_token
        attention.q_proj.weight *= 3  # places attend to clicks that are near,
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.out_proj.weight *= 0.3  # and remain different
    up1, _, _, up2, _ = decoder.output_upscaling
    for up in (up1, up2):  # smooth, or every mask is dots all over the picture
        up.weight.copy_(2 * up.weight.mean((2, 3), keepdim=True))
    up2.weight[:, 0], up2.bias[0] = 0, 3  # a channel that is 3 everywhere: its weight is a mask's bias
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.layers[-1].weight *= 0.1  # large logits that clicks change a little: stable masks
        mlp.layers[-1].bias.copy_(5000 * torch.randn(mlp.layers[-1].bias.shape))
        mlp.layers[-1].bias[0] = 0
    decoder.iou_prediction_head.layers[-1].weight *= 0.1
    decoder.iou_prediction_head.layers[-1].bias[:] = 1
    points = [[[x, y]] for x in (20, 60, 100) for y in (20, 60, 100)]
    _, _, low_res = model.predict(model.encode(np.asarray(Image.open(MEADOW).convert("RGB"))), points)
    for n in range(3):
        decoder.output_hypernetworks_mlps[n + 1].layers[-1].bias[0] -= low_res[:, n].quantile(0.7) / 3
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    torch.save(small_sam().state_dict(), folder / "sam_vit_b_01ec64.pth")
    tensors = midas_file.random_tensors(midas_file.published_shapes(**midas_file.SMALL))
    torch.save(tensors, folder / "dpt_large_384.pt")
    return folder


@pytest.fixture
def one_network(monkeypatch):
    """A run and the test look with the same network of a kind, so that bits can be compared. Of weights at other
    addresses numbers are the same to a tolerance, and a pixel at a threshold may fall on its other side."""
    load = published.load
    once = functools.cache(lambda kind, file: load(kind, file, torch.float32))
    monkeypatch.setattr(published, "load", lambda kind, file, *_: once(kind, Path(file)))


@pytest.fixture
def maps_seen(monkeypatch, one_network):
    """-> a list that fills with the change maps that the model is given, in place of a model that looks at them"""
    seen = []

    def edit(model, prompt, picture, change_map, **_):
        seen.append(change_map)
        return picture / 2 + 0.5

    monkeypatch.setattr(sample, "edit", edit)
    return seen


def expected(folder, text, image, white_is_change=False):
    spec = maps.parse(text)
    model = published.load(spec.network, published.find(spec.network, folder), torch.float32)
    return maps.compute(spec, np.asarray(image), model, white_is_change)


@pytest.mark.parametrize("text", ["depth", "depth:equalize,quantize=4", CLICK, "sam:0,0.6"])
def test_a_computed_map_is_used_as_the_same_map_drawn(tmp_path, folder, maps_seen, text):
    this = ["--image", MEADOW, "--prompt", "snow at night", "--networks", folder]
    run(tmp_path, *this, "--change-map", text, "--sheet", tmp_path / "sheet.png")
    mu = expected(folder, text, Image.open(MEADOW).convert("RGB"))
    assert torch.equal(maps_seen[0][0, 0], mu) and 0 < mu.std()
    sample.tensor_to_picture(mu[None]).save(tmp_path / "map.png")
    run(tmp_path, *this[:-2], "--change-map", tmp_path / "map.png", "--sheet", tmp_path / "drawn.png")
    assert (maps_seen[1] - maps_seen[0]).abs().max() < 1 / 500
    sheet, drawn = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("sheet", "drawn"))
    assert sheet.shape == drawn.shape and np.abs(sheet[20:].astype(int) - drawn[20:]).max() <= 1
    assert json.loads(Image.open(tmp_path / "out.png").text["parameters"])["change_map"] == str(tmp_path / "map.png")


def test_an_edit_under_a_computed_map(tmp_path, folder):
    """The whole way, with the toy: what the map keeps, stays."""
    this = ["--image", MEADOW, "--prompt", "snow at night", "--networks", folder, "--change-map"]
    mu = expected(folder, "depth:equalize,window=0.4-0.6", Image.open(MEADOW).convert("RGB")).numpy()
    back = run(tmp_path, "--image", MEADOW, "--prompt", "snow at night", "--strength", 0)
    change = np.abs(run(tmp_path, *this, "depth:equalize,window=0.4-0.6") - back).mean(2)
    assert change[mu == 0].mean() > 2 * change[mu == 1].mean()
    parameters = json.loads(Image.open(tmp_path / "out.png").text["parameters"])
    assert parameters["change_map"] == "depth:equalize,window=0.4-0.6" and parameters["networks"] == str(folder)


def test_white_is_change(tmp_path, folder, maps_seen):
    this = ["--image", MEADOW, "--prompt", "night", "--networks", folder, "--white-is-change", "--change-map"]
    for text in ("depth:gamma=2", CLICK):
        run(tmp_path, *this, text)
        assert torch.equal(maps_seen[-1][0, 0], expected(folder, text, Image.open(MEADOW).convert("RGB"), True))


def turned(picture, path):
    exif = picture.getexif()
    exif[0x112] = 6  # shown turned clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def clear(picture, path):
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, picture.width).astype(np.uint8), (picture.height, 1))))
    picture.save(path)


@pytest.mark.parametrize("save", [turned, clear, lambda picture, path: picture.convert("L").save(path),
                                  lambda picture, path: picture.convert("P").save(path)])
def test_the_network_sees_the_picture_as_a_person_does(tmp_path, folder, maps_seen, save):
    """Upright, on white where transparent, in RGB. Clicks are in pixels of that; the map is cut as the picture is."""
    path = tmp_path / "in.png"
    save(Image.open(MEADOW).convert("RGB").resize((200, 300)), path)
    picture = sample.to_rgb(sample.open_picture(path))
    assert picture.size == (200, 300)
    this = ["--image", path, "--prompt", "snow", "--networks", folder, "--size", "64x64"]
    for text in ("depth", "sam:150,290=0"):
        run(tmp_path, *this, "--change-map", text)
        mu = expected(folder, text, picture)
        assert mu.shape == (300, 200) and maps_seen[-1].shape == (1, 1, 64, 64)
        want = cv2.resize(mu[50:250].numpy(), (64, 64), interpolation=cv2.INTER_AREA)  # the middle
        assert np.abs(maps_seen[-1][0, 0].numpy() - want).mean() < 0.02


def test_networks_run_once_and_are_gone_before_the_weights_are_read(tmp_path, folder, monkeypatch):
    alive, calls, load, encode, read = [], [], published.load, sam.SAM.encode, sd.load

    def watched(*args):
        model = load(*args)
        alive.append(weakref.ref(model))
        calls.append("load")
        return model

    def looked(*args):
        gc.collect()
        assert alive and not any(model() for model in alive)
        return read(*args)

    monkeypatch.setattr(published, "load", watched)
    monkeypatch.setattr(sam.SAM, "encode", lambda *args: calls.append("encode") or encode(*args))
    monkeypatch.setattr(sd, "load", looked)
    run(tmp_path, "--image", MEADOW, "--prompt", "snow", "--networks", folder, "--change-map", CLICK)
    assert calls == ["load", "encode"]


# Clicks in a collage


@pytest.fixture
def clicks(tmp_path):
    """A collage that moves what is at a click, of a copy of the meadow beside it -> its file"""
    Image.open(MEADOW).convert("RGB").save(tmp_path / "p.png")
    content = {"image": "p.png", "segments": [{"click": [40, 60], "edits": [{"translate": [9, 0]}]}]}
    (tmp_path / "edits.json").write_text(json.dumps(content))
    return tmp_path / "edits.json"


@pytest.fixture
def edits_seen(monkeypatch, one_network):
    """-> a list that fills with what Magic Fixup is given: (reference, coarse, mask, change map)"""
    seen = []
    monkeypatch.setattr(sample, "fixup", lambda model, *given, **_: seen.append(given) or given[1] / 2 + 0.5)
    return seen


def test_who_resolves_clicks(tmp_path, folder, clicks, edits_seen, monkeypatch):
    model = published.load("sam", published.find("sam", folder), torch.float32)
    segment = sam.segmenter(model)(np.asarray(Image.open(tmp_path / "p.png")), (40, 60))
    assert 0.01 < segment.mean() < 0.99
    holes = segment & ~np.pad(segment, ((0, 0), (9, 0)))[:, :-9]  # moved to the right by 9
    run(tmp_path, "--collage", clicks, "--segments", "sam", "--networks", folder)
    assert np.array_equal(edits_seen[0][2][0, 0].numpy() == 0, holes)
    run(tmp_path, "--collage", clicks)
    run(tmp_path, "--collage", clicks, "--segments", "classical")
    assert torch.equal(edits_seen[1][2], edits_seen[2][2]) and not torch.equal(edits_seen[0][2], edits_seen[1][2])


def test_a_map_and_a_collages_clicks_share_one_look(tmp_path, folder, clicks, edits_seen, monkeypatch):
    looks, encode = [], sam.SAM.encode
    monkeypatch.setattr(sam.SAM, "encode", lambda *args: looks.append(args) or encode(*args))
    run(tmp_path, "--collage", clicks, "--segments", "sam", "--networks", folder, "--change-map", CLICK)
    assert len(looks) == 1
    want = expected(folder, CLICK, Image.open(tmp_path / "p.png"))
    assert torch.equal(edits_seen[0][3][0, 0], want)  # over the reference


def test_both_networks_and_magic_fixup(tmp_path, folder, clicks):
    """The whole way."""
    run(tmp_path, "--collage", clicks, "--segments", "sam", "--networks", folder, "--change-map", "depth",
        "--sheet", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width == 4 * 128 + 3 * 2  # reference, edit, map, result


# Mistakes


def test_one_clear_line(tmp_path, capsys, folder, clicks, monkeypatch):
    monkeypatch.setattr(sample, "read_model", lambda *_: pytest.fail("the weights were read"))
    this = ["--image", MEADOW, "--prompt", "snow", "--out", tmp_path / "out.png", "--change-map"]
    here, empty = ["--networks", folder], ["--networks", tmp_path]
    assert "'flip' is no transform; say depth" in fails(capsys, *this, "depth:flip", *here)
    assert "'2' is no value in 0 .. 1; say sam" in fails(capsys, *this, "sam:1,1=2", *here)
    assert "outside the picture of 128x128" in fails(capsys, *this, "sam:128,1=0", *here)
    assert "no such file" in fails(capsys, *this, "depth.png")
    assert "no such file" in fails(capsys, *this, "./depth")
    assert "--change-map is empty" in fails(capsys, *this, "")
    line = fails(capsys, *this, "depth", *empty)
    assert "dpt_large_384.pt" in line and str(tmp_path) in line and "--networks" in line
    assert "sam_vit_h_4b8939.pth" in fails(capsys, *this, CLICK, *empty)
    assert "sam_vit_h_4b8939.pth" in fails(capsys, "--collage", clicks, "--segments", "sam", *empty)
    assert "--networks is where" in fails(capsys, *this, MEADOW, *here)
    assert "--networks is where" in fails(capsys, "--collage", clicks, "--segments", "classical", *here)
    assert "--segments" in fails(capsys, *this, "depth", "--segments", "sam", *here)
    assert "--segments" in fails(capsys, "--prompt", "snow", "--segments", "classical")
    assert "invalid choice" in fails(capsys, "--collage", clicks, "--segments", "magic")
    (tmp_path / "dpt_large_384.pt").write_bytes((folder / "dpt_large_384.pt").read_bytes()[:5000])
    assert "damaged" in fails(capsys, *this, "depth", *empty)
    assert not list(tmp_path.glob("out*"))


def test_a_missing_network_is_told_before_another_one_runs(tmp_path, capsys, folder, clicks, monkeypatch):
    monkeypatch.setattr(published, "load", lambda *_: pytest.fail("a network was read"))
    (tmp_path / "sam_vit_b_01ec64.pth").symlink_to(folder / "sam_vit_b_01ec64.pth")
    this = ["--collage", clicks, "--segments", "sam", "--networks", tmp_path, "--out", tmp_path / "out.png"]
    assert "dpt_large_384.pt" in fails(capsys, *this, "--change-map", "depth")
