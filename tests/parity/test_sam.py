"""sam.py and automask.py against the authors' own package, on random weights in the layout of the published files."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from bench.peers import OPERATORS
from checkpoints import published
from networks import sam
from networks.automask import automatic_masks, make_point_grid, segments, suppress
from networks.sam import CONFIGS, SAM
from tests.small import relative_error

TOY = CONFIGS["toy"]  # 8 x 8 patches, and windows of 5 x 5: the last are filled up


def plain_nms(boxes, scores, iou_threshold):
    """torchvision::nms for builds of torchvision without one for the CPU."""
    order = scores.sort(descending=True, stable=True).indices
    b = boxes[order]
    sides = torch.minimum(b[:, None, 2:], b[:, 2:]) - torch.maximum(b[:, None, :2], b[:, :2])
    common, area = sides.clamp(min=0).prod(2), (b[:, 2:] - b[:, :2]).prod(1)
    overlap = common / (area[:, None] + area - common) > iou_threshold
    kept = []
    for i in range(len(b)):
        if not overlap[i, kept].any():
            kept.append(i)
    return order[kept]


@pytest.fixture(scope="session")
def peer():
    """The `segment-anything` package: its modeling, predictor and automatic mask generator."""
    pytest.importorskip("segment_anything")
    extension = pytest.importorskip("torchvision.extension")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        OPERATORS.impl("nms", plain_nms, "CPU")
        extension._has_ops = lambda: True
    import segment_anything
    from segment_anything import modeling, sam_model_registry

    return SimpleNamespace(modeling=modeling, Predictor=segment_anything.SamPredictor,
                           Generator=segment_anything.SamAutomaticMaskGenerator, sizes=sam_model_registry)


def peer_model(peer, c, seed=0):
    """The authors' model with random weights."""
    m = peer.modeling
    torch.manual_seed(seed)
    model = m.Sam(
        m.ImageEncoderViT(
            img_size=c.size, patch_size=c.patch, embed_dim=c.width, depth=c.depth, num_heads=c.heads, out_chans=c.dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=c.window,
            global_attn_indexes=c.global_blocks),
        m.PromptEncoder(c.dim, (c.grid, c.grid), (c.size, c.size), mask_in_chans=16),
        m.MaskDecoder(
            transformer_dim=c.dim, iou_head_hidden_dim=c.dim,
            transformer=m.TwoWayTransformer(depth=2, embedding_dim=c.dim, mlp_dim=c.hidden, num_heads=8)),
    ).eval().requires_grad_(False)
    for name, p in model.named_parameters():  # every bias, norm and table gets a value of its own
        p += (0.5 if "pos" in name else 0.05) * torch.randn(p.shape)
    return model


@pytest.fixture(scope="module")
def toy(peer, tmp_path_factory):
    """(the authors' model, ours loaded from its file, the file)"""
    model, file = peer_model(peer, TOY), tmp_path_factory.mktemp("sam") / "sam_toy.pth"
    torch.save(model.state_dict(), file)
    return model, published.load("sam", file), file


@pytest.fixture(scope="module")
def sharp(peer):
    """(the authors' model, ours), still random, but with automatic masks of many sizes and places, and IoU near 0.5."""
    theirs, ours = peer_model(peer, TOY), SAM(TOY).requires_grad_(False).eval()
    decoder, last = theirs.mask_decoder, theirs.image_encoder.neck[3]
    for p in (last.weight, last.bias, theirs.prompt_encoder.no_mask_embed.weight):
        p *= 0.1  # what is there counts less than where it is:
    for name, attention in decoder.named_modules():
        if name.endswith(("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")):
            attention.q_proj.weight *= 5  # places attend to clicks that are near
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.out_proj.weight *= 8
    up1, up2 = decoder.output_upscaling[0], decoder.output_upscaling[3]
    for up in (up1, up2):  # smooth, or every mask is dots all over the picture
        up.weight.copy_(2 * up.weight.mean((2, 3), keepdim=True) + 0.1 * up.weight)
    up2.weight[:, 0], up2.bias[0] = 0, 3  # a channel that is 3 everywhere: its weight is a mask's bias
    image = picture(151, 203, seed=1)
    ours.load_state_dict(theirs.state_dict())
    _, iou, low_res = ours.predict(ours.encode(image), points=(make_point_grid(6) * [203, 151])[:, None])
    for n in range(3):
        decoder.output_hypernetworks_mlps[n + 1].layers[-1].bias[0] -= low_res[:, n].quantile(0.85) / 3
        decoder.iou_prediction_head.layers[-1].bias[n + 1] += 0.5 - iou[:, n].median()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def picture(H, W, seed=0):
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(tiles, (W, H), interpolation=cv2.INTER_NEAREST)


# --- The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"window": 4}, {"window": 8, "global_blocks": ()}, {"size": 256, "heads": 2}])
def test_encoder_same_numbers(peer, changed):
    c = replace(TOY, depth=2, global_blocks=(1,)) if "size" in changed else TOY
    c = replace(c, **changed)
    theirs = peer_model(peer, c, seed=1).image_encoder
    ours = sam.ImageEncoder(c).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, c.size, c.size)
    assert relative_error(ours(x), theirs(x)) <= 1e-4


def clicks(H, W, B=3, N=4):
    return np.random.default_rng(2).random((B, N, 2)) * [W, H]


def test_prompt_encoder_same_numbers(toy):
    theirs, ours, _ = toy
    points = torch.as_tensor(clicks(TOY.size, TOY.size))
    sparse, dense = theirs.prompt_encoder((points.clone(), torch.ones(points.shape[:2])), None, None)
    ours_sparse, ours_dense = ours.prompt_encoder(points)
    assert relative_error(ours_sparse, sparse) <= 1e-4
    assert relative_error(ours_dense.expand_as(dense), dense) <= 1e-4
    assert relative_error(ours.prompt_encoder.grid(), theirs.prompt_encoder.get_dense_pe()) <= 1e-4


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("n", [2, 9])
def test_decoder_same_numbers(toy, n, multimask):
    theirs, ours, _ = toy
    torch.manual_seed(3)
    embedding, pe = torch.randn(2, 1, TOY.dim, TOY.grid, TOY.grid)
    sparse, dense = torch.randn(3, n, TOY.dim), torch.randn(1, TOY.dim, TOY.grid, TOY.grid)
    low_res, iou = theirs.mask_decoder(embedding, pe, sparse, dense, multimask)
    ours_iou, hyper, image = ours.mask_decoder.attend(embedding, pe, sparse, dense)
    which = slice(1, None) if multimask else slice(0, 1)
    assert relative_error(ours_iou[:, which], iou) <= 1e-4
    assert relative_error(ours.mask_decoder.draw(image, hyper[:, which]), low_res) <= 1e-4


def compare_predictions(predictor, ours, image, points):
    """The authors' predictor and ours, at these points of a picture"""
    predictor.set_image(image)
    encoded = ours.encode(image)
    assert relative_error(encoded.embedding, predictor.features) <= 1e-4
    there = torch.as_tensor(predictor.transform.apply_coords(points, image.shape[:2]))
    logits, iou, low_res = predictor.predict_torch(there, torch.ones(points.shape[:2]), return_logits=True)
    masks, ours_iou, ours_low_res = ours.predict(encoded, points)
    assert relative_error(ours_iou, iou) <= 1e-4
    assert relative_error(ours_low_res, low_res) <= 1e-4
    assert relative_error(ours.upscale(ours_low_res, encoded), logits) <= 1e-4
    clear = logits.abs() > 1e-4 * logits.abs().max()
    assert masks.dtype == torch.bool and masks.shape == logits.shape and (masks == (logits > 0))[clear].all()


@pytest.mark.parametrize("size", [(96, 128), (75, 101), (128, 128), (233, 150), (31, 200)])
def test_predictor_same_numbers(peer, toy, size):
    theirs, ours, _ = toy
    compare_predictions(peer.Predictor(theirs), ours, picture(*size), clicks(*size))


def test_other_pictures_are_refused(toy):
    for bad in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32), np.zeros((0, 9, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            toy[1].encode(bad)


@pytest.mark.skipif(not os.environ.get("SAM_FULL"), reason="a minute and 2 GB: set SAM_FULL=1")
def test_vit_b_same_numbers(peer):
    c = CONFIGS["vit_b"]
    theirs = peer_model(peer, c)
    with torch.device("meta"):
        ours = SAM(c)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.requires_grad_(False).eval()
    compare_predictions(peer.Predictor(theirs), ours, picture(427, 640), clicks(427, 640, 2, 1))


# --- Automatic masks ------------------------------------------------------------------------------


COMMON = dict(points_per_side=9, pred_iou_thresh=0.5, stability_score_thresh=0.5, stability_score_offset=0.002,
              box_nms_thresh=0.85)


@pytest.mark.parametrize("size", [(96, 128), pytest.param((301, 421), marks=pytest.mark.slow)])
def test_same_automatic_masks(peer, sharp, size):
    theirs, ours = sharp
    image = picture(*size, seed=1)
    want = peer.Generator(theirs, **COMMON).generate(image)
    got = automatic_masks(ours, image, **COMMON)
    assert len(got) == len(want) >= 5
    for a, b in zip(got, want):
        assert a.keys() == b.keys() - {"crop_box"}
        # Where a logit is 0 to within rounding, the two may differ.
        assert a["segmentation"].dtype == bool and (a["segmentation"] != b["segmentation"]).sum() <= 2
        assert abs(a["area"] - b["area"]) <= 2 and a["area"] == a["segmentation"].sum()
        assert a["bbox"] == b["bbox"] and a["point_coords"] == b["point_coords"]
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], rel=1e-4)
        assert a["stability_score"] == pytest.approx(b["stability_score"], abs=2e-3)


def test_no_automatic_masks(sharp):
    assert automatic_masks(sharp[1], picture(40, 50), points_per_side=2, pred_iou_thresh=1e9) == []


def test_batches_of_points_do_not_matter(sharp):
    one, all_ = (automatic_masks(sharp[1], picture(96, 128), **COMMON, points_per_batch=n) for n in (1, 99))
    assert [r["bbox"] for r in one] == [r["bbox"] for r in all_] and len(one) > 1


def test_suppression_is_the_plain_one():
    g = np.random.default_rng(0)
    boxes = np.sort(g.integers(0, 12, (200, 2, 2)), axis=1).reshape(200, 4)  # equal and empty ones among them
    scores = g.integers(0, 9, 200) / 8
    kept = suppress([{"box": box, "n": n} for n, box in enumerate(boxes)], scores, 0.5)
    assert [c["n"] for c in kept] == plain_nms(torch.tensor(boxes).float(), torch.tensor(scores), 0.5).tolist()


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("vit_b", 93_735_472), ("vit_l", 312_342_832), ("vit_h", 641_090_608)])
def test_published_sizes_load(peer, tmp_path, name, count):
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in peer.sizes[name]().state_dict().items()}
    one = torch.zeros(1)  # of which the file holds one copy
    torch.save({k: one.expand(shape) for k, shape in shapes.items()}, tmp_path / "sam.pth")
    model = published.load("sam", tmp_path / "sam.pth")  # it raises for missing and unexpected ones
    assert model.config == CONFIGS[name] and sum(p.numel() for p in model.parameters()) == count
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_bf16(toy):
    _, ours, file = toy
    half, image = published.load("sam", file, torch.bfloat16), picture(96, 128)
    assert half.image_encoder.pos_embed.dtype == torch.bfloat16
    # The frequencies keep their digits. What is made of them is so to a tolerance: they lie at other addresses.
    matrices = [m.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix for m in (half, ours)]
    assert torch.equal(*matrices)
    grids = half.prompt_encoder.grid(), ours.prompt_encoder.grid()
    assert grids[0].dtype == grids[1].dtype == torch.float32 and relative_error(*grids) <= 1e-5
    a, b = half.encode(image), ours.encode(image)
    assert relative_error(a.embedding.float(), b.embedding) < 0.1
    masks, iou, low_res = half.predict(a, points=[[[30, 20]]])
    assert low_res.isfinite().all() and iou.dtype == low_res.dtype == torch.float32


# --- What the other files ask for -----------------------------------------------------------------


def test_segmenter(toy, monkeypatch):
    ours = toy[1]
    encodings, encode = [], SAM.encode
    monkeypatch.setattr(SAM, "encode", lambda self, image: encodings.append(1) or encode(self, image))
    segment_at, image = sam.segmenter(ours), picture(75, 101)
    masks, iou, _ = ours.predict(encode(ours, image), points=[[[30.0, 20.0]]])
    mask = segment_at(image, (30.5, 20.5))
    assert mask.dtype == bool and np.array_equal(mask, masks[0, iou[0].argmax()].numpy())
    segment_at(image, (60, 50))
    assert len(encodings) == 1
    image[:9] = 0  # the same array, another picture
    segment_at(image, (60, 50))
    assert len(encodings) == 2


def test_segments(sharp):
    ours, image = sharp[1], picture(96, 128)
    labels = segments(ours, image, **COMMON)
    assert labels.dtype == np.int32 and labels.shape == (96, 128)
    assert set(np.unique(labels)) - {0} == set(range(1, labels.max() + 1)) and labels.max() > 1
    records = automatic_masks(ours, image, **COMMON)
    assert np.array_equal(labels > 0, np.any([r["segmentation"] for r in records], 0))
    smallest = min(records, key=lambda r: r["area"])["segmentation"]
    assert len(np.unique(labels[smallest])) == 1
    median = int(np.median([r["area"] for r in records]))
    labels = segments(ours, image, smallest=median, **COMMON)
    large = [r["segmentation"] for r in records if r["area"] >= median]
    assert np.array_equal(labels > 0, np.any(large, 0)) and len(large) < len(records)
