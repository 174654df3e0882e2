"""lpips.py against the package of the same name: a random backbone in torchvision's file, the package's own heads."""

import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from checkpoints import published
from networks import lpips
from tests.small import relative_error


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("torchvision")
    sys.modules.setdefault("lpips.trainer", types.ModuleType("lpips.trainer"))  # its training asks for scipy
    return pytest.importorskip("lpips")


def random_backbone(torchvision):
    """torchvision's whole state dict. The classifier, which nobody reads, takes no memory."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in torchvision.models.alexnet(weights=None).state_dict().items()}
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for k, shape in shapes.items():
        if not k.startswith("features."):
            tensors[k] = torch.zeros(1).expand(shape)
        elif len(shape) == 4:
            tensors[k] = torch.randn(shape, generator=g) * (2 / shape[1:].numel()) ** 0.5
        else:
            tensors[k] = torch.randn(shape, generator=g) * 0.05
    return tensors


def pictures(H, W, B=2):
    g = torch.Generator().manual_seed(H)
    return torch.rand(B, 3, H, W, generator=g) * 2 - 1, torch.rand(B, 3, H, W, generator=g) * 2 - 1


def test_same_numbers_as_the_package(package, tmp_path):
    """Of one random backbone and the package's own heads"""
    import torchvision
    tensors = random_backbone(torchvision)
    torch.save(tensors, tmp_path / "backbone.pth")
    ours = published.load_lpips(tmp_path / "backbone.pth", Path(package.__file__).parent / "weights/v0.1/alex.pth")
    with torch.device("meta"):
        empty = torchvision.models.alexnet(weights=None)
    with mock.patch.object(torchvision.models, "alexnet", lambda pretrained: empty):  # saves drawing the classifier
        peer = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    net = {k: tensors["features." + k.split(".", 1)[1]] for k in peer.net.state_dict()}  # slice1.0.weight: features.0.
    peer.net.load_state_dict(net, assign=True)
    peer.requires_grad_(False).eval()
    for size in ((64, 96), (63, 77)):
        x, y = pictures(*size)
        for spatial, shape in ((False, (2,)), (True, (2, 1, *size))):
            peer.spatial = spatial
            got, want = ours(x, y, spatial=spatial), peer(x, y)
            assert got.shape == shape
            assert relative_error(got, want.reshape(shape)) <= 1e-4


# --- Without peers --------------------------------------------------------------------------------


def random_model():
    torch.manual_seed(0)
    model = lpips.LPIPS().eval().requires_grad_(False)
    for l in range(len(lpips.TAPS)):
        getattr(model, f"lin{l}").model[1].weight.abs_()  # as the released ones
    return model


def test_the_gradient_is_finite_where_a_layer_sees_nothing():
    model = random_model()
    model.features[0].bias.fill_(-100)  # nothing gets through the first ReLU
    x, y = pictures(32, 32)
    model(x.requires_grad_(), y).sum().backward()
    assert x.grad.isfinite().all()


def test_pictures_that_do_not_go_together():
    model = random_model()
    for a, b in ((pictures(32, 32)[0], pictures(32, 33)[0]), pictures(30, 40), (torch.zeros(3, 32, 32),) * 2):
        with pytest.raises(ValueError, match="of one size, 31 pixels or more"):
            model(a, b)
