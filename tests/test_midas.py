"""midas.py against transformers' DPT, on random weights in the layout of MiDaS's published file.

DPT_LARGE=1 repeats it at full size: half a minute, 4 GB of memory, 1.4 GB of disk.
"""

import os
import re

import numpy as np
import pytest
import torch

from checkpoints import published
from networks import midas

SMALL = {"width": 128, "blocks": 8, "grid": 4, "channels": (8, 16, 32, 32), "features": 32}
LARGE = {"width": 1024, "blocks": 24, "grid": 24, "channels": (256, 512, 1024, 1024), "features": 256}


def published_shapes(width, blocks, grid, channels, features):
    """{name: shape} of dpt_large_384.pt, written down from isl-org/MiDaS (midas/dpt_depth.py, blocks.py, backbones/)
    and timm's VisionTransformer, of which vit_large_patch16_384 is one. Independent of midas.py."""
    D, C, f = width, channels, features
    layers = {  # name: (a weight's shape, has it a bias)
        "pretrained.model.patch_embed.proj": ((D, 3, 16, 16), True),
        "pretrained.model.norm": ((D,), True),
        "pretrained.model.head": ((1000, D), True),
        "pretrained.act_postprocess1.4": ((C[0], C[0], 4, 4), True),
        "pretrained.act_postprocess2.4": ((C[1], C[1], 2, 2), True),
        "pretrained.act_postprocess4.4": ((C[3], C[3], 3, 3), True),
        "scratch.output_conv.0": ((f // 2, f, 3, 3), True),
        "scratch.output_conv.2": ((32, f // 2, 3, 3), True),
        "scratch.output_conv.4": ((1, 32, 1, 1), True),
    }
    for i in range(blocks):
        for name, shape in (("norm1", (D,)), ("attn.qkv", (3 * D, D)), ("attn.proj", (D, D)),
                            ("norm2", (D,)), ("mlp.fc1", (4 * D, D)), ("mlp.fc2", (D, 4 * D))):
            layers[f"pretrained.model.blocks.{i}.{name}"] = shape, True
    for i in (1, 2, 3, 4):
        layers[f"pretrained.act_postprocess{i}.0.project.0"] = (D, 2 * D), True
        layers[f"pretrained.act_postprocess{i}.3"] = (C[i - 1], D, 1, 1), True
        layers[f"scratch.layer{i}_rn"] = (f, C[i - 1], 3, 3), False
        layers[f"scratch.refinenet{i}.out_conv"] = (f, f, 1, 1), True
        for unit in ("resConfUnit1.conv1", "resConfUnit1.conv2", "resConfUnit2.conv1", "resConfUnit2.conv2"):
            layers[f"scratch.refinenet{i}.{unit}"] = (f, f, 3, 3), True
    shapes = {"pretrained.model.cls_token": (1, 1, D), "pretrained.model.pos_embed": (1, grid * grid + 1, D)}
    for name, (shape, bias) in layers.items():
        shapes |= {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})
    return shapes


def random_tensors(shapes):
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g)
        if ".norm" in name and name.endswith("weight"):
            tensors[name] = 1 + 0.1 * x
        else:
            tensors[name] = x.mul_(np.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.2)
    tensors["scratch.output_conv.4.bias"] += 3  # most of the picture above 0, where the last ReLU cuts
    return tensors


def peer_of(tensors, config):
    """transformers' model with the same weights. It has a name for every tensor but the classifier's."""
    transformers = pytest.importorskip("transformers")
    hooks = [config["blocks"] * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    with torch.device("meta"):
        peer = transformers.DPTForDepthEstimation(transformers.DPTConfig(
            hidden_size=config["width"], num_hidden_layers=config["blocks"], num_attention_heads=config["width"] // 64,
            intermediate_size=4 * config["width"], image_size=16 * config["grid"], patch_size=16, layer_norm_eps=1e-6,
            backbone_out_indices=hooks, neck_hidden_sizes=list(config["channels"]), readout_type="project",
            fusion_hidden_size=config["features"], reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
        ))
    parts = "neck.reassemble_stage."
    table = (
        (r"pretrained\.model\.(cls_token)", r"dpt.embeddings.\1"),
        (r"pretrained\.model\.pos_embed", r"dpt.embeddings.position_embeddings"),
        (r"pretrained\.model\.patch_embed\.proj", r"dpt.embeddings.patch_embeddings.projection"),
        (r"pretrained\.model\.norm\.", r"dpt.layernorm."),
        (r"pretrained\.model\.blocks\.(\d+)\.", r"dpt.encoder.layer.\1."),
        (r"\.norm1\.", r".layernorm_before."), (r"\.norm2\.", r".layernorm_after."),
        (r"attn\.proj", r"attention.output.dense"), (r"attn\.([qkv]\w+)\.", r"attention.attention.\1."),
        (r"mlp\.fc1", r"intermediate.dense"), (r"mlp\.fc2", r"output.dense"),
        (r"pretrained\.act_postprocess(\d)\.0\.project\.0", lambda m: f"{parts}readout_projects.{int(m[1]) - 1}.0"),
        (r"pretrained\.act_postprocess(\d)\.3", lambda m: f"{parts}layers.{int(m[1]) - 1}.projection"),
        (r"pretrained\.act_postprocess(\d)\.4", lambda m: f"{parts}layers.{int(m[1]) - 1}.resize"),
        (r"scratch\.layer(\d)_rn", lambda m: f"neck.convs.{int(m[1]) - 1}"),
        (r"scratch\.refinenet(\d)", lambda m: f"neck.fusion_stage.layers.{4 - int(m[1])}"),
        (r"out_conv", r"projection"), (r"resConfUnit(\d)\.conv(\d)", r"residual_layer\1.convolution\2"),
        (r"scratch\.output_conv", r"head.head"),
    )
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("pretrained.model.head."):
            continue
        qkv = zip(("query", "key", "value"), tensor.chunk(3)) if ".qkv." in name else (("", tensor),)
        for letter, part in qkv:
            theirs = name.replace("qkv", letter)
            for pattern, new in table:
                theirs = re.sub(pattern, new, theirs)
            renamed[theirs] = part
    peer.load_state_dict(renamed, assign=True)
    return peer.requires_grad_(False).eval()


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def check_against_transformers(config, sizes, folder):
    tensors = random_tensors(published_shapes(**config))
    torch.save(tensors, folder / "dpt.pt")
    model, peer = published.load("midas", folder / "dpt.pt"), peer_of(tensors, config)
    for B, H, W in sizes:
        x = torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(W)) * 2 - 1
        # Without this, transformers takes any number of patches for a square of them.
        told = peer.neck.register_forward_pre_hook(lambda _, args, h=H // 16, w=W // 16: (args[0], h, w))
        with torch.inference_mode():
            got, want = model(x), peer(x).predicted_depth
        told.remove()
        assert got.shape == (B, H, W) and (got > 0).float().mean() > 0.5 and got.std() > 0.1
        assert relative_error(got, want) <= 1e-4


def test_same_numbers_as_transformers(tmp_path):
    check_against_transformers(SMALL, [(2, 64, 64), (1, 32, 96), (1, 96, 64), (1, 32, 32)], tmp_path)


@pytest.mark.skipif("DPT_LARGE" not in os.environ, reason="slow: DPT_LARGE=1 runs it")
def test_same_numbers_as_transformers_at_full_size(tmp_path):
    check_against_transformers(LARGE, [(1, 384, 384), (1, 256, 416)], tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def fake_file(path, shapes, **changes):
    """A file in which every tensor is one number. changes: tensors instead, None for leaving one out."""
    tensors = {k: torch.zeros(1).expand(s) for k, s in shapes.items()} | changes
    torch.save({k: v for k, v in tensors.items() if v is not None}, path)
    return path


def test_the_published_file_fits_at_full_size(tmp_path):
    shapes = published_shapes(**LARGE)
    assert round(sum(int(np.prod(s)) for s in shapes.values()) / 1e6) == 344  # as the release's table says, in millions
    model = published.load("midas", fake_file(tmp_path / "dpt_large_384.pt", shapes))
    assert model.config == midas.DPTConfig() == midas.DPTConfig(**LARGE)
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    left_out = set(shapes) - set(ours)
    assert ours == {k: s for k, s in shapes.items() if k not in left_out}
    assert all(k.startswith(("pretrained.model.norm.", "pretrained.model.head.", "scratch.refinenet4.resConfUnit1."))
               for k in left_out) and len(left_out) == 8
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_dtype(tmp_path):
    model = published.load("midas", fake_file(tmp_path / "dpt.pt", published_shapes(**SMALL)), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    d = midas.depth(model, np.zeros((40, 50, 3), np.uint8))
    assert d.dtype == torch.float32 and d.shape == (40, 50)


# ---------------------------------------------------------------------------------------------------------------------
# A picture's depth


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("midas") / "small.pt"
    torch.save(random_tensors(published_shapes(**SMALL)), path)
    return path


def test_sizes_are_the_releases():
    """What MiDaS's Resize gives at 384, 'minimal', worked out by hand; transformers' has the same rule."""
    by_hand = {(384, 384): (384, 384), (1920, 1080): (672, 384), (1080, 1920): (384, 672), (640, 480): (512, 384),
               (300, 200): (384, 256), (200, 300): (256, 384), (480, 320): (576, 384),
               (1000, 20): (384, 32)}
    for size, want in by_hand.items():
        assert midas.fitted_size(*size, 384) == want
    pil = pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")
    for width, height in np.random.default_rng(0).integers(150, 3000, (200, 2)).tolist():
        peer = pil.get_resize_output_image_size(np.zeros((1, height, width)), (384, 384), True, 32)
        assert midas.fitted_size(width, height, 384) == (peer.width, peer.height)


def test_depth_of_a_picture(small):
    model = published.load("midas", small)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    as_is = model(torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None])[0]
    assert torch.allclose(midas.depth(model, image), as_is, atol=1e-5)  # at the network's own size nothing is resampled
    for H, W in ((63, 101), (130, 48), (7, 90)):
        image = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
        d = midas.depth(model, image)
        assert d.shape == (H, W) and d.dtype == torch.float32 and d.isfinite().all()
    with pytest.raises(ValueError, match="multiples of 32 pixels, not 64x48"):
        model(torch.zeros(1, 3, 48, 64))
