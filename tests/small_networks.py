"""Files of a small random Segment Anything and MiDaS under their published names; a collage that clicks."""

import json

import numpy as np
import torch
from PIL import Image

from networks import sam
from tests.midas_file import SMALL, published_shapes, random_tensors
from tests.runs import MEADOW

CLICK = "sam:40,60=0;90,30=0.5"


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


def write_networks(folder):
    torch.save(small_sam().state_dict(), folder / "sam_vit_b_01ec64.pth")
    torch.save(random_tensors(published_shapes(**SMALL)), folder / "dpt_large_384.pt")
    return folder


def write_clicks(folder):
    """A collage that moves what is at a click, of a copy of the meadow beside it -> its file"""
    Image.open(MEADOW).convert("RGB").save(folder / "p.png")
    content = {"image": "p.png", "segments": [{"click": [40, 60], "edits": [{"translate": [9, 0]}]}]}
    (folder / "edits.json").write_text(json.dumps(content))
    return folder / "edits.json"
