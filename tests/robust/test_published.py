"""checkpoints/published.py: published files, found, read, refused; small and random ones under those names."""

import hashlib
import os
import re
from pathlib import Path

import pytest
import torch

from checkpoints import published
from networks import lpips, midas, raft, sam
from tests.networks import FILES, write_networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each kind, and of LPIPS, which are zeros."""
    folder = tmp_path_factory.mktemp("networks")
    write_networks(folder)
    with torch.device("meta"):
        model = lpips.LPIPS()
    tensors = {k: torch.zeros(1).expand(t.shape) for k, t in model.state_dict().items()}
    tensors["classifier.6.bias"] = torch.zeros(9)  # which nobody reads
    for file, heads in zip(published.LPIPS, (False, True)):
        torch.save({k: t for k, t in tensors.items() if k.startswith("lin") == heads}, folder / file)
    return folder


def refused(load, *arguments):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load(*arguments)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


# --- Files ----------------------------------------------------------------------------------------


def test_find(folder, tmp_path):
    for kind, name in FILES.items():
        assert published.find(kind, folder) == folder / name
        message = refused(published.find, kind, tmp_path)
        assert all(part in message for part in (name, "github.com", str(tmp_path), "--networks DIR"))
    for name in ("sam_vit_b_01ec64.pth", "sam_vit_l_0b3195.pth", "sam_vit_h_4b8939.pth"):
        (tmp_path / name).touch()
        assert published.find("sam", tmp_path) == tmp_path / name  # the larger, the better
    assert published.find_lpips(folder) == (folder / "alexnet-owt-7be5be79.pth", folder / "alex.pth")
    (tmp_path / "alex.pth").touch()
    assert "there is no alexnet-owt-7be5be79.pth in" in refused(published.find_lpips, tmp_path)


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
             "alex.pth": "this is the heads of LPIPS",
             "alexnet-owt-7be5be79.pth": "this is a classifier of torchvision"}
    for kind, name in FILES.items():
        for other in words.keys() - {name}:
            assert words[other] in refused(published.load, kind, folder / other)
    assert "this is Segment Anything" in refused(published.load_lpips, folder / FILES["sam"], folder / "alex.pth")


# --- LPIPS: two files -----------------------------------------------------------------------------


def test_lpips_files(folder, tmp_path):
    backbone, heads = published.find_lpips(folder)
    model = published.load_lpips(backbone, heads)
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    content, few = (torch.load(path, weights_only=True) for path in (backbone, heads))
    torch.save({k: t for k, t in content.items() if not k.startswith("features.8.")}, tmp_path / "short.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    torch.save({k: t for k, t in few.items() if "lin4" not in k}, tmp_path / "few.pth")
    (tmp_path / "cut.pth").write_bytes(heads.read_bytes()[:200])
    short, resnet, few, cut = (tmp_path / f"{name}.pth" for name in ("short", "resnet", "few", "cut"))
    for files, told in (
        ((heads, backbone), "expected torchvision's whole AlexNet, and this is the heads"),
        ((backbone, backbone), "expected the heads of LPIPS with AlexNet, and this is a classifier"),
        ((short, heads), "2 missing tensors, e.g. features.8"),
        ((resnet, heads), "missing"),
        ((backbone, few), "1 missing tensors, e.g. lin4"),
        ((backbone, cut), "damaged"),
        ((cut, heads), "damaged"),
        ((tmp_path / "nowhere.pth", heads), "there is no file"),
    ):
        message = refused(published.load_lpips, *files)
        assert told in message and (str(folder) in message or str(tmp_path) in message)
