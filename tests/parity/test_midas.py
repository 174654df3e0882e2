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
from tests.networks import DPT_LARGE, DPT_SMALL, published_shapes, random_tensors
from tests.small import relative_error


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
    check_against_transformers(DPT_SMALL, [(2, 64, 64), (1, 32, 96), (1, 96, 64), (1, 32, 32)], tmp_path)


@pytest.mark.skipif("DPT_LARGE" not in os.environ, reason="slow: DPT_LARGE=1 runs it")
def test_same_numbers_as_transformers_at_full_size(tmp_path):
    check_against_transformers(DPT_LARGE, [(1, 384, 384), (1, 256, 416)], tmp_path)


# --- Files ----------------------------------------------------------------------------------------


def fake_file(path, shapes, **changes):
    """A file in which every tensor is one number. changes: tensors instead, None for leaving one out."""
    tensors = {k: torch.zeros(1).expand(s) for k, s in shapes.items()} | changes
    torch.save({k: v for k, v in tensors.items() if v is not None}, path)
    return path


def test_the_published_file_fits_at_full_size(tmp_path):
    shapes = published_shapes(**DPT_LARGE)
    assert round(sum(int(np.prod(s)) for s in shapes.values()) / 1e6) == 344  # as the release's table says, in millions
    model = published.load("midas", fake_file(tmp_path / "dpt_large_384.pt", shapes))
    assert model.config == midas.DPTConfig() == midas.DPTConfig(**DPT_LARGE)
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    left_out = set(shapes) - set(ours)
    assert ours == {k: s for k, s in shapes.items() if k not in left_out}
    assert all(k.startswith(("pretrained.model.norm.", "pretrained.model.head.", "scratch.refinenet4.resConfUnit1."))
               for k in left_out) and len(left_out) == 8
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_dtype(tmp_path):
    model = published.load("midas", fake_file(tmp_path / "dpt.pt", published_shapes(**DPT_SMALL)), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    d = midas.depth(model, np.zeros((40, 50, 3), np.uint8))
    assert d.dtype == torch.float32 and d.shape == (40, 50)


# --- A picture's depth ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("midas") / "small.pt"
    torch.save(random_tensors(published_shapes(**DPT_SMALL)), path)
    return path


def test_sizes_are_the_releases():
    """What MiDaS's Resize gives at 384, 'minimal', worked out by hand; transformers' has the same rule."""
    by_hand = {(384, 384): (384, 384), (1920, 1080): (672, 384), (1080, 1920): (384, 672), (640, 480): (512, 384),
               (300, 200): (384, 256), (200, 300): (256, 384), (480, 320): (576, 384),
               (1000, 20): (384, 32)}
    for size, want in by_hand.items():
        assert midas.fit_size(*size, 384) == want
    pil = pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")
    for width, height in np.random.default_rng(0).integers(150, 3000, (200, 2)).tolist():
        peer = pil.get_resize_output_image_size(np.zeros((1, height, width)), (384, 384), True, 32)
        assert midas.fit_size(width, height, 384) == (peer.width, peer.height)


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
