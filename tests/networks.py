"""RAFT, Segment Anything and MiDaS, small and random, in files under their published names."""

import torch

from networks import midas, raft, sam

FILES = {"raft": "raft_large_C_T_SKHT_V2-ff5fadd5.pth", "sam": "sam_vit_b_01ec64.pth", "midas": "dpt_large_384.pt"}
DPT = midas.DPTConfig(width=64, blocks=4, grid=2, channels=(8, 8, 8, 8), features=8)


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


def write_networks(folder, motion=0.0):
    """A file of each kind in the folder; by RAFT all moves by `motion` pixels of 128x128 to the right."""
    torch.manual_seed(0)
    torch.save(raft_that_says(motion, 0).state_dict(), folder / FILES["raft"])
    torch.save(sam_that_is_sure().state_dict(), folder / FILES["sam"])
    torch.save(midas.DPT(DPT).state_dict(), folder / FILES["midas"])
