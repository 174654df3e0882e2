"""Makes torchvision, a peer, importable where it was built for another PyTorch than is here (there is no CPU build of
it): two operators are then missing, which its import, and so transformers', asks for by name."""

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
