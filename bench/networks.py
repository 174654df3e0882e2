"""python -m bench's topic of the networks that the papers lean on: RAFT, Segment Anything, DPT-Large, LPIPS.

They have random weights, and stand beside their peers, at the size of what is published or the smallest of it.
"""

from functools import partial

import numpy as np
import torch

from bench import peers
from bench.clock import compare, make_if_installed
from networks import lpips, midas, raft, sam

LPIPS_NAMES = {"alexnet": "alex", "vgg16": "vgg", "squeezenet1_1": "squeeze"}  # torchvision's and ours: the package's


# Functions that make two functions without arguments, ours and the peer's.


def make_raft_pair():
    from torchvision.models.optical_flow import raft_large

    peer = raft_large(weights=None).eval()
    ours = raft.RAFT().eval()
    ours.load_state_dict(peer.state_dict())
    first, second = torch.rand(2, 1, 3, 520, 960) * 2 - 1
    return partial(ours, first, second), lambda: peer(first, second, num_flow_updates=12)[-1]


def make_sam_pair():
    import segment_anything

    peer = segment_anything.sam_model_registry["vit_b"]()
    ours = sam.SAM(sam.CONFIGS["vit_b"]).eval()
    ours.load_state_dict(peer.state_dict())
    predictor = segment_anything.SamPredictor(peer)
    picture = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)

    def encode():
        predictor.set_image(picture)
        return predictor.features

    return lambda: ours.encode(picture).embedding, encode


def make_dpt_pair():
    """Each with random weights of its own, as their names differ: only their times are compared."""
    import transformers

    config = transformers.DPTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        backbone_out_indices=[5, 11, 17, 23], neck_hidden_sizes=[256, 512, 1024, 1024], is_hybrid=False)
    peer = transformers.DPTForDepthEstimation(config).eval()
    ours = midas.DPT(midas.DPTConfig()).eval()
    photo = torch.rand(1, 3, 384, 384) * 2 - 1
    return partial(ours, photo), lambda: peer(photo).predicted_depth


def make_lpips_pair(name):
    package = peers.import_lpips()
    peer = package.LPIPS(net=LPIPS_NAMES[name], pnet_rand=True, verbose=False)
    tensors = {}
    for k, tensor in peer.state_dict().items():
        if k.startswith("net."):  # net.slice1.0.weight is torchvision's features.0.weight
            tensors["features." + k.split(".", 2)[2]] = tensor
        elif k.startswith("lin") and not k.startswith("lins."):
            tensors[k] = tensor
    ours = lpips.LPIPS(name).eval()
    ours.load_state_dict(tensors)
    x, y = torch.rand(2, 2, 3, 512, 512) * 2 - 1
    return partial(ours, x, y), lambda: peer(x, y).flatten()


PAIRS = {  # what: (function, the peer, whether their weights are the same)
    "RAFT-Large, 960x520, 12 updates": (make_raft_pair, "torchvision", True),
    "SAM ViT-B, encoder, 1280x720": (make_sam_pair, "segment-anything", True),
    "DPT-Large, 384x384": (make_dpt_pair, "transformers", False),
    **{f"LPIPS, {name}, 2 pairs of 512x512": (partial(make_lpips_pair, name), "lpips", True) for name in LPIPS_NAMES},
}


def measure_networks(o):
    """The networks that the papers lean on, with random weights, on the CPU.

    Weights are the peer's, but for DPT-Large, whose two have weights of their own.
    """
    for what, (make, peer, same) in PAIRS.items():
        pair = make_if_installed(make)
        if pair:
            yield compare(o, what, *pair, peer, same)


TOPICS = {"networks": measure_networks}
