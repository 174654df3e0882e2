"""Moving pixels along optical flow: forward (splatting), backward (sampling), and as a collage of rigid pieces.

    softsplat(x, flow, metric, mode)    forward: pixels are thrown to where the flow says; leaves holes (splat.py)
    backwarp(x, flow)                   backward: every pixel is fetched from where the flow says
    compose_flow(f01, f12)              0 -> 1 -> 2, and forward_backward_consistency(f01, f10)
    piecewise_affine_warp(image, ...)   the second motion model of Magic Fixup: one similarity transform per segment
    read_flo, write_flo, flow_to_colour

A flow is (B, 2, H, W) in pixels, x to the right before y down; pixel centres are whole numbers. A vector that is not
finite says "no correspondence", and NaN is what the functions here write for it.
"""

import os
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from splat import softsplat

# ---------------------------------------------------------------------------------------------------------------------
# Sampling, and flows


def positions(flow):
    """flow (B, 2, H, W) -> where each pixel goes: X, Y, each (B, H, W)"""
    H, W = flow.shape[-2:]
    return torch.arange(W, device=flow.device) + flow[:, 0], torch.arange(H, device=flow.device)[:, None] + flow[:, 1]


def sample(x, X, Y, padding):
    """x (B, C, H, W) read at X, Y (B, h, w), bilinear; padding 'zeros' or 'border' -> (B, C, h, w)"""
    H, W = x.shape[-2:]
    grid = torch.stack([(2 * X + 1) / W - 1, (2 * Y + 1) / H - 1], dim=-1)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode=padding, align_corners=False)


def backwarp(x, flow, outside="zeros", *, mask=False):
    """Backward warp: x (B, C, H, W) read at q + flow[q], bilinear -> (B, C, H, W).

    A pixel is a unit square: positions in -0.5 .. W - 0.5 are inside, and near the edge read the edge. Those outside
    give 0, or with outside='border' the nearest edge; a flow that is not finite gives 0. With mask=True also
    (B, 1, H, W) bool: True = inside. Computed in float32 or better. Differentiable in x and flow.
    """
    if outside not in ("zeros", "border"):
        raise ValueError(f"outside is 'zeros' or 'border', not {outside!r}")
    H, W = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    X, Y = positions(flow.to(dtype))
    valid = ((X >= -0.5) & (X <= W - 0.5) & (Y >= -0.5) & (Y <= H - 0.5))[:, None]
    finite = (X.isfinite() & Y.isfinite())[:, None]
    y = sample(x.to(dtype), X.where(finite[:, 0], 0), Y.where(finite[:, 0], 0), "border")
    y = y.where(valid if outside == "zeros" else finite, 0).to(x.dtype)
    return (y, valid) if mask else y


def compose_flow(f01, f12, outside="unknown"):
    """Flow 0 -> 1 and flow 1 -> 2, both (B, 2, H, W) -> flow 0 -> 2.

    The next flow is read at the displaced position (Magic Fixup, section 3.5): f02[q] = f01[q] + f12[q + f01[q]].
    A pixel that is out of frame in between gets NaN. With outside='border' it goes on as the nearest edge does.
    """
    if outside == "border":
        return f01 + backwarp(f12, f01, "border")
    f12, inside = backwarp(f12, f01, mask=True)
    return (f01 + f12).where(inside, torch.nan)


def forward_backward_consistency(f01, f10):
    """(B, 2, H, W) twice -> (B, 1, H, W) bool: True where going there and back leads home; False where occluded.

    The usual test, Sundaram et al. 2010, equation 5: |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5, b read where f leads.
    """
    residual = compose_flow(f01, f10)  # f + b; NaN, which compares False, out of frame
    f, b, residual = (v.square().sum(1, keepdim=True) for v in (f01, residual - f01, residual))
    return residual < 0.01 * (f + b) + 0.5


def importance(image, target, flow):
    """(B, 3, H, W) twice in [0, 1] and flow (B, 2, H, W) -> (B, 1, H, W): who wins where several pixels land.

    As the release: -20 |I - backwarp(I_gt)|. (Its clipping to -20 .. 20 changes nothing between pictures in [0, 1].)
    """
    return -20 * (image - backwarp(target, flow)).abs().mean(1, keepdim=True)


FLO_MAGIC = b"PIEH"  # 202021.25 as a float32; then width and height as int32, then x, y in reading order, float32
FLO_UNKNOWN = 1e9  # Middlebury's sign for "no flow here" is anything larger


def read_flo(path):
    """A Middlebury .flo file -> (2, H, W) float32 in pixels, NaN where unknown. ValueError if it is not one."""
    data = Path(path).read_bytes()
    if len(data) < 12 or data[:4] != FLO_MAGIC:
        raise ValueError(f"{path} is not a .flo file: it does not begin with {FLO_MAGIC.decode()} and a size")
    W, H = np.frombuffer(data, "<i4", 2, offset=4).tolist()
    if W < 1 or H < 1 or len(data) != 12 + 8 * W * H:
        raise ValueError(f"{path} is damaged: {len(data)} bytes cannot hold a flow of {W} x {H} pixels")
    flow = np.frombuffer(data, "<f4", offset=12).astype(np.float32).reshape(H, W, 2)
    flow = torch.from_numpy(flow).permute(2, 0, 1).contiguous()
    return flow.where(flow.abs() <= FLO_UNKNOWN, torch.nan)


def write_flo(path, flow):
    """flow (2, H, W) -> a Middlebury .flo file, whole or not at all. What is not finite is written as unknown."""
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise ValueError(f"a .flo file holds one flow (2, H, W), not {tuple(flow.shape)}")
    path, (_, H, W) = Path(path), flow.shape
    flow = flow.detach().cpu().float()
    flow = flow.where(flow.isfinite(), 10 * FLO_UNKNOWN).permute(1, 2, 0).numpy()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(FLO_MAGIC + np.array([W, H], "<i4").tobytes() + flow.astype("<f4").tobytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def flow_to_colour(flow, largest=None):
    """flow (B, 2, H, W) -> a picture (B, 3, H, W) in 0 .. 1: hue is direction (right: red, down: lime, left: cyan),
    saturation is length as a share of `largest` pixels (None: each flow's own longest); unknown is black.
    """
    known = flow.isfinite().all(1, keepdim=True)
    flow = flow.where(known, 0)
    length = flow.norm(dim=1, keepdim=True)  # (B, 1, H, W)
    largest = length.amax((2, 3), keepdim=True).clamp(min=1e-6) if largest is None else largest
    hue = torch.atan2(flow[:, 1:], flow[:, :1]) * (3 / torch.pi)  # -3 .. 3, six colours around
    offset = torch.tensor([0.0, 4.0, 2.0], device=flow.device).view(1, 3, 1, 1)
    colour = (((hue + offset) % 6 - 3).abs() - 1).clamp(0, 1)
    return (1 - (length / largest).clamp(max=1) * (1 - colour)) * known


# ---------------------------------------------------------------------------------------------------------------------
# The piecewise affine motion model of Magic Fixup, section 3.5


def piecewise_affine_warp(image, flow, segments, depth, metric=None, *, points=500, seed=0):
    """A collage: every segment moves by the similarity transform that fits its flow best, the rest by the flow itself.

    image     (C, H, W) float;  flow (2, H, W) in pixels
    segments  (H, W) whole numbers, 0 = none. One whose flow is known nowhere, or fits nothing, goes with the rest
    depth     (H, W), larger = farther. Segments are laid over the rest, from the farthest on average to the nearest
    metric    (H, W), the importance where pixels of the rest collide (None: they mix)
    points    per segment, drawn with `seed`, for RANSAC at 3 pixels. (The release takes 50.)
      ->      image (C, H, W), 0 in holes;  holes (H, W) bool;  source (H, W, 2): x, y that each pixel came from, NaN
              in holes. All on the CPU. ValueError for shapes that do not fit.
    """
    image, flow, segments, depth = (t.detach().cpu() for t in (image, flow, segments, depth))
    C, H, W = image.shape
    if flow.shape != (2, H, W) or segments.shape != (H, W) or depth.shape != (H, W):
        sizes = ", ".join(str(tuple(t.shape)) for t in (flow, segments, depth))
        raise ValueError(f"flow, segments, depth {sizes} do not fit an image of {H} rows by {W} columns")
    image, flow = image.float(), flow.float()
    here = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")).float()  # (2, H, W): x, y

    rng, pieces = np.random.default_rng(seed), []
    for label in segments.unique().tolist():
        inside = segments == label
        if label and (transform := fit_similarity(here[:, inside], flow[:, inside], points, rng)) is not None:
            pieces.append((depth[inside].double().mean().item(), inside, transform))
    rest = ~torch.stack([inside for _, inside, _ in pieces]).any(0) if pieces else torch.ones(H, W, dtype=torch.bool)

    # Splatting the coordinates along with the colours says where each pixel came from.
    layer, holes = softsplat(
        torch.cat([image, here])[None], flow.where(rest, torch.nan)[None],
        None if metric is None else metric.detach().cpu().float()[None, None], "avg" if metric is None else "soft",
        holes=True,
    )
    out, source, holes = layer[0, :C], layer[0, C:], holes[0, 0]
    source[:, holes] = torch.nan
    for _, inside, A in sorted(pieces, key=lambda piece: -piece[0]):
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        y0, y1, x0, x1 = rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1
        box = A @ np.array([[x0 - 1, x1, x0 - 1, x1], [y0 - 1, y0 - 1, y1, y1], [1, 1, 1, 1]])
        (u0, v0), (u1, v1) = np.floor(box.min(1)), np.ceil(box.max(1)) + 1  # where it goes, at most
        u0, u1, v0, v1 = (int(np.clip(v, 0, n)) for v, n in ((u0, W), (u1, W), (v0, H), (v1, H)))
        if u0 >= u1 or v0 >= v1:
            continue
        back = torch.from_numpy(cv2.invertAffineTransform(A)).double()
        X, Y = torch.einsum("ij,jhw->ihw", back[:, :2], here[:, v0:v1, u0:u1].double()) + back[:, 2, None, None]
        # Cut the piece out before sampling, so that none of its surroundings come along: colours weighted by coverage.
        cover = inside[None, y0:y1, x0:x1].float()
        piece = torch.cat([image[:, y0:y1, x0:x1] * cover, cover])[None]
        piece = sample(piece, (X - x0).float()[None], (Y - y0).float()[None], "zeros")[0]
        cover = piece[C] > 0.5
        out[:, v0:v1, u0:u1] = torch.where(cover, piece[:C] / piece[C].clamp(min=0.5), out[:, v0:v1, u0:u1])
        source[:, v0:v1, u0:u1] = torch.where(cover, torch.stack([X, Y]).float(), source[:, v0:v1, u0:u1])
        holes[v0:v1, u0:u1] &= ~cover
    return out, holes, source.permute(1, 2, 0)


def fit_similarity(here, flow, points, rng):
    """Pixels (2, n) and their flow (2, n) -> (2, 3) float64: rotation, scale and shift, or None if nothing fits."""
    known = flow.isfinite().all(0).nonzero()[:, 0].numpy()
    if len(known) < 2:
        return None
    if len(known) > points:
        known = rng.choice(known, points, replace=False)
    start, end = here[:, known].T.numpy(), (here + flow)[:, known].T.numpy()
    A, _ = cv2.estimateAffinePartial2D(start, end, method=cv2.RANSAC, ransacReprojThreshold=3.0)
    return A if A is not None and np.isfinite(A).all() and abs(np.linalg.det(A[:, :2])) > 1e-8 else None
