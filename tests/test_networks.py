"""Published files: found, read, refused; and data.py by all three networks, small and random ones under those names."""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from checkpoints import published
from networks import lpips, midas, raft, sam
from pairs import ShardPairs
from tests.runs import contents, film, last_line, picture
from video import estimators

fails = functools.partial(last_line, program=data)
DPT = midas.DPTConfig(width=64, blocks=4, grid=2, channels=(8, 8, 8, 8), features=8)
SIDE, PAN = 64, 2.4  # pixels of the pairs, and by how many the film goes left in data.STEP, four frames of 25 a second


def raft_that_says(x, y):
    """RAFT by which everything moves by x, y pixels of 128x128 in the first iteration, whatever it sees."""
    model = raft.RAFT()
    head = model.update_block.flow_head.conv2
    head.weight.data.zero_()
    head.bias.data.copy_(torch.tensor([x / 8, y / 8]))
    return model


def sam_that_is_sure():
    """Segment Anything whose masks are random, but have sharp edges and are thought good."""
    model = sam.SAM(sam.CONFIGS["toy"])
    for name, p in model.named_parameters():
        p.data += (0.5 if "pos" in name else 0.05) * torch.randn(p.shape)
    for mlp in model.mask_decoder.output_hypernetworks_mlps:
        mlp.layers[-1].weight.data *= 1000
    model.mask_decoder.iou_prediction_head.layers[-1].bias.data += 3
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each kind, and of LPIPS with AlexNet and VGG-16, which are zeros."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for name, model in (("raft_large_C_T_SKHT_V2-ff5fadd5.pth", raft_that_says(-PAN * 128 / SIDE, 0)),
                        ("sam_vit_b_01ec64.pth", sam_that_is_sure()), ("dpt_large_384.pt", midas.DPT(DPT))):
        torch.save(model.state_dict(), folder / name)
    for name in ("alexnet", "vgg16"):
        with torch.device("meta"):
            model = lpips.LPIPS(name)
        tensors = {k: torch.zeros(1).expand(t.shape) for k, t in model.state_dict().items()}
        tensors["classifier.6.bias"] = torch.zeros(9)  # which nobody reads
        for file, heads in zip(published.LPIPS[name], (False, True)):
            torch.save({k: t for k, t in tensors.items() if k.startswith("lin") == heads}, folder / file)
    return folder


FILES = {"raft": "raft_large_C_T_SKHT_V2-ff5fadd5.pth", "sam": "sam_vit_b_01ec64.pth", "midas": "dpt_large_384.pt"}


def refused(load, *arguments):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load(*arguments)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_find(folder, tmp_path):
    for kind, name in FILES.items():
        assert published.find(kind, folder) == folder / name
        message = refused(published.find, kind, tmp_path)
        assert all(part in message for part in (name, "github.com", str(tmp_path), "--networks DIR"))
    for name in ("sam_vit_b_01ec64.pth", "sam_vit_l_0b3195.pth", "sam_vit_h_4b8939.pth"):
        (tmp_path / name).touch()
        assert published.find("sam", tmp_path) == tmp_path / name  # the larger, the better
    assert published.find_lpips(folder=folder) == (folder / "alexnet-owt-7be5be79.pth", folder / "alex.pth")
    (tmp_path / "vgg.pth").touch()
    assert "there is no vgg16-397923af.pth in" in refused(published.find_lpips, "vgg16", tmp_path)


def test_digest(tmp_path):
    content = os.urandom(2**20 + 3)
    (tmp_path / "file").write_bytes(content)
    assert published.digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", FILES)
def test_loaded_models_are_frozen_and_mapped(folder, kind):
    model = published.load(kind, folder / FILES[kind])
    assert isinstance(model, {"raft": raft.RAFT, "sam": sam.SAM, "midas": midas.DPT}[kind])
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    if Path("/proc/self/maps").exists():
        assert str(folder / FILES[kind]) in Path("/proc/self/maps").read_text()


ONE = {  # of each kind, a tensor of those that every size has
    "raft": "mask_predictor.conv.bias", "sam": "mask_decoder.iou_token.weight",
    "midas": "scratch.refinenet2.out_conv.bias",
}


@pytest.mark.parametrize("kind", FILES)
def test_wrong_files(folder, tmp_path, kind):
    one, file, tensors = ONE[kind], tmp_path / FILES[kind], torch.load(folder / FILES[kind], weights_only=True)

    def message(tensors):
        torch.save(tensors, file)
        message = refused(published.load, kind, file)
        assert str(file) in message and "expected" in message and FILES[kind] in message
        return message

    assert f"1 missing tensors, e.g. {one}" in message({k: t for k, t in tensors.items() if k != one})
    assert "1 unexpected tensors, e.g. extra.weight" in message(tensors | {"extra.weight": torch.zeros(3)})
    assert f"1 misshapen tensors, e.g. {one} (7,) instead of" in message(tensors | {one: torch.zeros(7)})
    assert "conv1.weight" in message({"conv1.weight": torch.zeros(3, 3)})
    assert re.search("missing|no tensor", message({f"model.{k}": t for k, t in tensors.items()}))
    for cut, told in ((50_000, "damaged"), (0, "empty")):
        file.write_bytes((folder / FILES[kind]).read_bytes()[:cut])
        assert told in (text := refused(published.load, kind, file)) and FILES[kind] in text
    assert "there is no file" in refused(published.load, kind, tmp_path / "none.pth")


@pytest.mark.parametrize("kind, one, shape", [
    ("sam", "image_encoder.blocks.0.attn.rel_pos_h", (9, 0)), ("sam", "image_encoder.neck.0.weight", ()),
    ("sam", "image_encoder.patch_embed.proj.weight", (3,)), ("sam", "image_encoder.pos_embed", (1, 0, 0, 64)),
    ("midas", "pretrained.model.pos_embed", (7,)), ("midas", "pretrained.model.pos_embed", (1, 5, 65)),
    ("midas", "pretrained.model.pos_embed", (1, 0, 64)), ("midas", "scratch.layer1_rn.weight", ()),
])
def test_shapes_that_make_no_network(folder, tmp_path, kind, one, shape):
    file = tmp_path / FILES[kind]
    torch.save(torch.load(folder / FILES[kind], weights_only=True) | {one: torch.zeros(shape)}, file)
    assert f"{file}: expected" in refused(published.load, kind, file)


def test_other_models_of_midas(folder, tmp_path):
    tensors, file = torch.load(folder / FILES["midas"], weights_only=True), tmp_path / "dpt_large_384.pt"
    hybrid = {k: t for k, t in tensors.items() if k != "pretrained.act_postprocess1.3.weight"}
    seven = {k: t for k, t in tensors.items() if ".blocks.3." not in k}
    v21 = {"pretrained.layer1.0.weight": torch.zeros(1)}
    for other, told in ((hybrid, "no tensor pretrained.act_postprocess1.3.weight"), (seven, "3 blocks"),
                        (v21, "no tensor pretrained.model.pos_embed; the first is pretrained.layer1.0.weight")):
        torch.save(other, file)
        assert told in refused(published.load, "midas", file)


def test_another_networks_file_is_recognised(folder):
    words = {FILES["raft"]: "this is RAFT", FILES["sam"]: "this is Segment Anything", FILES["midas"]: "this is a MiDaS",
             "alex.pth": "this is the heads of LPIPS", "vgg16-397923af.pth": "this is a classifier of torchvision"}
    for kind, name in FILES.items():
        for other in words.keys() - {name}:
            assert refused(published.load, kind, folder / other).endswith(words[other]) or other.startswith("vgg")
            assert words[other] in refused(published.load, kind, folder / other)
    assert "this is Segment Anything" in refused(published.load_lpips, folder / FILES["sam"], folder / "alex.pth")


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS: two files


def test_lpips_network_is_recognised(folder):
    for name in ("alexnet", "vgg16"):
        model = published.load_lpips(*published.find_lpips(name, folder))
        assert model.network == lpips.NETWORKS[name]
        assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_lpips_wrong_files(folder, tmp_path):
    (alexnet, alex), (vgg16, vgg) = (published.find_lpips(name, folder) for name in ("alexnet", "vgg16"))
    content = torch.load(vgg16, weights_only=True)
    torch.save({k: t for k, t in content.items() if not k.startswith("features.28.")}, tmp_path / "short.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    torch.save({k: t for k, t in torch.load(vgg, weights_only=True).items() if "lin4" not in k}, tmp_path / "few.pth")
    (tmp_path / "cut.pth").write_bytes(vgg.read_bytes()[:200])
    short, resnet, few, cut = (tmp_path / f"{name}.pth" for name in ("short", "resnet", "few", "cut"))
    for backbone, heads, told in (
        (alexnet, vgg, "expected the heads of alexnet (alex.pth)"),
        (vgg16, alex, "expected the heads of vgg16 (vgg.pth)"),
        (vgg, vgg16, "expected the whole alexnet, vgg16 or squeezenet1_1 of torchvision, and this is the heads"),
        (vgg16, vgg16, "and this is a classifier"),
        (short, vgg, "closest to vgg16, but for 2 missing"),
        (resnet, vgg, "expected the whole"),
        (vgg16, few, "1 missing tensors, e.g. lin4"),
        (vgg16, cut, "damaged"),
        (cut, vgg, "damaged"),
        (tmp_path / "nowhere.pth", vgg, "there is no file"),
    ):
        message = refused(published.load_lpips, backbone, heads)
        assert told in message and (str(folder) in message or str(tmp_path) in message)


# ---------------------------------------------------------------------------------------------------------------------
# As estimators: data.py


@pytest.fixture
def quick(monkeypatch):
    """RAFT at a size and a number of iterations for tests, where no other process needs to know."""
    monkeypatch.setitem(estimators.FLOW, "raft", lambda model, frames: raft.clip_flows(model, frames, (128, 128), 1))
    yield
    estimators.model.cache_clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return film(tmp_path_factory.mktemp("film") / "pan.mp4", pan=PAN / 4)


def test_what_estimators_give(folder, quick):
    names = {"flow": (estimators.FLOW, "dis", "raft"), "segments": (estimators.SEGMENTS, "classical", "sam"),
             "depth": (estimators.DEPTH, "flow", "midas")}
    weights = estimators.find(["raft", "sam", "midas", "dis", "flow"], folder)
    assert weights == {kind: folder / name for kind, name in FILES.items()}
    first, second = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), np.uint8)
    flow = np.ones((2, 48, 80), np.float32)
    arguments = {"flow": ([first, second],), "segments": (first,), "depth": (first, flow)}
    for what, (table, classical, network) in names.items():
        old, new = (estimators.estimator(table, name, weights)(*arguments[what]) for name in (classical, network))
        if what == "flow":
            assert len(old) == len(new) == 1
            old, new = old[0].numpy(), new[0].numpy()
        assert old.shape == new.shape and (old.dtype == new.dtype or what == "depth"), what
        assert np.isfinite(new).all() and (new.min() >= 0 or what != "segments")
    near = midas.depth(published.load("midas", weights["midas"]), first).numpy()
    far = estimators.estimator(estimators.DEPTH, "midas", weights)(first, None)
    ends = far.ravel()[near.argmax()], far.ravel()[near.argmin()]
    assert near.std() > 0 and ends == pytest.approx((far.min(), far.max()), rel=1e-4)  # of two loaded networks


def test_a_stretch_of_flows_is_estimated_once_and_together():
    asked, frames, known = [], list(range(10)), {}

    def estimate(frames):
        asked.append(frames)
        return [10 * a + b for a, b in zip(frames, frames[1:])]

    def flows(i, j):
        asked.clear()
        assert data.flows_between(estimate, frames, i, j, known) == [11 * k + 1 for k in range(i, j)]
        return asked

    assert flows(3, 5) == [[3, 4, 5]]
    assert flows(3, 5) == []
    assert flows(1, 7) == [[1, 2, 3], [5, 6, 7]]  # on both sides of what is known
    assert flows(0, 9) == [[0, 1], [7, 8, 9]]


ALL = ("--flow", "raft", "--segments", "sam", "--depth", "midas")


def test_pairs_by_all_three_networks(folder, clip, tmp_path, quick, capsys):
    data.main([str(clip), "--out", str(tmp_path), "--size", str(SIDE), "--pairs", "3", *ALL, "--networks", str(folder)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["totals"]["kept"] == 3 and str(folder) not in json.dumps(manifest)
    assert manifest["networks"] == {kind: {"file": name, "sha256": published.digest(folder / name)}
                                    for kind, name in FILES.items()}
    assert len(list(ShardPairs(tmp_path, "affine", epochs=1))) == 3
    weights = estimators.find(FILES, folder)
    _, _, files, _ = data.make_pair(data.Recipe(size=SIDE, flow="raft", segments="sam", depth="midas"),
                                    ("pan.mp4", clip), 0, weights=weights)
    told = json.loads(files["json"])
    assert told["estimators"] == ["raft", "sam", "midas"] and told["segments"] >= 1
    assert told["moved_95"] == pytest.approx(PAN * told["steps"], abs=0.1)  # this RAFT knows the film
    ref, gt, coarse = (picture(files, k).astype(float) for k in ("ref.jpg", "gt.jpg", "flow.png"))
    kept = coarse[..., 3] == 255
    assert np.abs(coarse[..., :3] - gt)[kept].mean() < 0.25 * np.abs(ref - gt)[kept].mean()


def test_another_file_is_another_recipe(folder, clip, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    arguments = (clip, "--out", out, "--size", "64", "--depth", "midas", "--networks")
    data.main([str(a) for a in (*arguments, folder)])
    done = contents(out)
    other.mkdir()
    (other / "dpt_large_384.pt").write_bytes((folder / "dpt_large_384.pt").read_bytes())
    data.main([str(a) for a in (*arguments, other)])  # the same file, elsewhere
    torch.save(midas.DPT(DPT).state_dict(), other / "dpt_large_384.pt")
    assert "was begun with other networks" in fails(capsys, *arguments, other)
    assert "was begun with other recipe" in fails(capsys, clip, "--out", out, "--size", "64")
    assert contents(out) == done


def test_two_workers_make_the_same(folder, clip, tmp_path):
    arguments = [str(clip), "--size", "64", "--pairs", "3", *ALL[2:], "--networks", str(folder)]
    for workers in ("1", "2"):
        data.main([*arguments, "--out", str(tmp_path / workers), "--workers", workers])
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and (tmp_path / "1" / "pairs-000000.tar").exists()


def test_wrong_networks_are_told_before_anything_is_written(folder, clip, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (clip, "--out", out, *ALL, "--networks", tmp_path)
    assert "RAFT-Large needs raft_large" in fails(capsys, *arguments)
    for kind in ("raft", "sam"):
        (tmp_path / FILES[kind]).symlink_to(folder / FILES[kind])
    assert "DPT-Large needs dpt_large_384.pt" in fails(capsys, *arguments)
    (tmp_path / FILES["midas"]).symlink_to(folder / FILES["sam"])
    assert fails(capsys, *arguments).endswith("and this is Segment Anything")
    assert fails(capsys, *arguments).startswith("data.py: error: ")
    assert "--device tpu cannot be used here" in fails(capsys, *arguments[:-1], folder, "--device", "tpu")
    assert not out.exists()
