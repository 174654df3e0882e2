"""A small Kandinsky 2.2 with random weights, in its two folders, as diffusers writes and opens them."""

import json

import torch
from safetensors.torch import save_file

import clip
from checkpoints import configs
from models import adm, movq, prior
from models.image_encoder import ImageConfig, ImageEncoder
from tests.small import TEXT, TOKENIZER, randomise, replace
from vae import VAEConfig

D = 32  # of embeddings
TEXT_CONFIG = replace(TEXT, width=D, heads=4, activation="gelu", projection=D)
PARTS = {  # of both folders: the network, its configuration, and what stands in its config.json
    "prior/prior": (prior.Prior, prior.PriorConfig(2, 12, 2, D), {
        "_class_name": "PriorTransformer", "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
        "embedding_dim": D}),
    "prior/text_encoder": (clip.TextEncoder, TEXT_CONFIG, configs.text_config_to_json(TEXT_CONFIG)),
    "prior/image_encoder": (
        ImageEncoder, ImageConfig(width=D, layers=3, heads=4, mlp_width=37, projection=D, side=28), {
            "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "hidden_size": D,
            "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37, "projection_dim": D,
            "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu"}),
    "decoder/unet": (
        adm.ADM, adm.ADMConfig(4, 8, (32, 64), (1, 1), (False, True), 4, D, 32, time_width=128), {
            "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 8, "block_out_channels": [32, 64],
            "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], "layers_per_block": 1,
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"], "cross_attention_dim": 32,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift",
            "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": D,
            "attention_head_dim": 4, "sample_size": 8}),
    "decoder/movq": (movq.MOVQ, VAEConfig((32, 64), 1, 4, 8, 1.0), {
        "_class_name": "VQModel", "block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4,
        "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "norm_type": "spatial", "vq_embed_dim": 4,
        "num_vq_embeddings": 12}),
}
SCHEDULERS = {
    "prior": {"_class_name": "UnCLIPScheduler", "prediction_type": "sample", "clip_sample_range": 10.0,
              "variance_type": "fixed_small_log", "clip_sample": True, "num_train_timesteps": 1000},
    "decoder": {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012,
                "variance_type": "learned_range", "clip_sample": True, "clip_sample_range": 2.0},
}
INDEX = {
    "prior": {"_class_name": "KandinskyV22PriorPipeline", "prior": ["diffusers", "PriorTransformer"],
              "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
              "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
              "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "UnCLIPScheduler"],
              "image_processor": [None, None]},
    "decoder": {"_class_name": "KandinskyV22Img2ImgPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
                "movq": ["diffusers", "VQModel"], "scheduler": ["diffusers", "DDPMScheduler"]},
}


def write_folders(folder):
    """-> the prior's, the decoder's"""
    for part, (network, config, c) in PARTS.items():
        torch.manual_seed(0)
        tensors = randomise(network(config)).state_dict()
        if part == "decoder/movq":
            tensors = {name.replace("group_norm.norm_layer", "spatial_norm.norm_layer")
                       .replace("group_norm.conv", "spatial_norm.conv"): x for name, x in tensors.items()}
            tensors["quantize.embedding.weight"] = torch.zeros(12, 4)
        stem = "model" if "encoder" in part else "diffusion_pytorch_model"
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / f"{stem}.safetensors", metadata={"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(c))
    TOKENIZER.save(folder / "prior/tokenizer")
    for name in ("prior", "decoder"):
        (folder / name / "scheduler").mkdir()
        (folder / name / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULERS[name]))
        (folder / name / "model_index.json").write_text(json.dumps(INDEX[name]))
    return folder / "prior", folder / "decoder"
