"""The toy of two stages of pixels, as DeepFloyd IF is made: 32 on a side, and then 128 beside the enlarged first.

    python -m reproduce.train_toys if-1      T5 and the first UNet   ->  runs/toy-if/model/IF-I
    python -m reproduce.train_toys if-2      the second              ->  runs/toy-if/model/IF-II

The networks are those of models/adm.py and models/t5.py, narrow. Two things are other than in DeepFloyd's: T5 is
trained here, with the first stage, on the captions alone, and the UNets predict the velocity. Their variance is not
learned: it stays the posterior's.
"""

import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import samplers
import train
from checkpoints.parts import load_part, save_part
from common.files import write_json
from common.run_state import generator_at
from diffusion import Schedule
from kernels.blocks import to_channels_last
from models import adm, deepfloyd, t5
from reproduce.toy_batches import MIXED, base_loss, cache_scenes, draws
from toy import world

SIDES = 32, 128  # pixels, of the stages
CROP = 64  # pixels of a picture that the second stage sees at a time, in training

# The configurations, as diffusers writes those of IF
FIRST = {
    "_class_name": "UNet2DConditionModel", "act_fn": "gelu", "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4, "attention_head_dim": 16, "block_out_channels": [32, 48, 64],
    "class_embed_type": None, "cross_attention_dim": 64, "cross_attention_norm": "group_norm", "encoder_hid_dim": 64,
    "down_block_types": ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "in_channels": 3, "layers_per_block": 1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_num_groups": 8,
    "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "sample_size": SIDES[0], "time_embedding_dim": 128,
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"],
}
SECOND = FIRST | {
    "block_out_channels": [32, 32, 48], "class_embed_type": "timestep", "in_channels": 6,
    "only_cross_attention": True, "sample_size": SIDES[1],
}
SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sample_max_value": 1.0, "thresholding": True,
    "variance_type": "learned_range",
}
SCHEDULE = Schedule("squaredcos_cap_v2", "v_prediction", offset=0)
TEXT = {
    "architectures": ["T5EncoderModel"], "d_ff": 128, "d_kv": 16, "d_model": 64, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False, "layer_norm_epsilon": 1e-6, "model_type": "t5", "num_heads": 4, "num_layers": 2,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
}


def learn_words(texts):
    """[(piece, log probability, kind)] as for `t5.Tokenizer`: every word and every comma of texts"""
    counts = Counter()
    for text in texts:
        counts.update("▁" + word for word in text.replace(",", "").split())
        counts[","] += text.count(",")
    total = torch.tensor(float(sum(counts.values()))).log().item()
    words = [(word, torch.tensor(float(n)).log().item() - total, t5.NORMAL) for word, n in sorted(counts.items())]
    return [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, t5.UNKNOWN), *words]


def new_unet(config):
    """A UNet before its training: it begins with no velocity. Its variance stays the smaller of both that it may be."""
    unet = adm.ADM(adm.config_from_json(config))
    nn.init.zeros_(unet.conv_out.weight)
    with torch.no_grad():
        unet.conv_out.bias.copy_(torch.tensor([0.0, 0, 0, -1, -1, -1]))
    return unet


def new_text(words):
    """T5 before its training"""
    text = t5.T5(t5.config_from_json(TEXT | {"vocab_size": words}))
    for name, p in text.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=1.0 if name == "shared.weight" else p.shape[1] ** -0.5)
    return text


def cache_pictures(recipe, out, device):
    """-> scenes, their pictures (N, 3, S, S) of bytes, and which of them are mixed, a list of bools: of both stages"""
    scenes = world.random_scenes(recipe.scenes, generator_at(recipe.seed, 0))
    made_from = json.dumps(["bytes", MIXED, scenes.x.tolist()])

    def encode(image):
        return (image * 127.5 + 127.5).round().byte()

    kept = cache_scenes(scenes, out / "pictures.safetensors", encode, made_from, device)
    return scenes, kept["latents"], kept["mixed"].tolist()


def stage_loss(unet, x, states, t, noise, beside=None):
    """The loss on the velocity; x, noise, beside (B, 3, h, w), states (B, 77, D), t (B,)"""
    level = None if beside is None else torch.full_like(t, deepfloyd.NOISE_LEVEL)

    def network(z, t, states):
        return unet(z, t, *unet.condition(states, level))[:, :3]

    return base_loss(network, SCHEDULE, x, states, t, noise, beside)


def sample_stage(unet, states, noise, beside=None):
    """Pictures (N, 3, h, w) in [-1, 1] for states (2 N, 77, D), without a caption and with it"""
    level = None if beside is None else deepfloyd.NOISE_LEVEL
    denoise = adm.make_denoiser(unet, states, 3.0, (), beside, level)
    draws = samplers.make_step_noise(noise.shape[1:], list(range(len(noise))))
    return samplers.run_sampler(denoise, noise, samplers.make_sampler("ddpm", SCHEDULE, 25), step_noise=draws)


def held_out(recipe, n, device):
    """-> captions of n scenes, their pictures (n, 3, S, S) in [-1, 1], noise like these"""
    g = generator_at(recipe.seed + 2, 0)
    scenes = world.random_scenes(n, g)
    image = world.render(scenes).image * 2 - 1
    return world.captions(scenes, g), image.to(device), torch.randn(image.shape, generator=g).to(device)


def train_first(recipe, out, resume, device):
    """Stage I and T5, together -> OUT/model/IF-I, as fp16. With --init the UNet of a first stage goes on, and its T5
    stays as it is, since a second stage reads it."""
    scenes, pictures, mixed = cache_pictures(recipe, out, device)
    pieces = learn_words(world.captions(scenes, generator_at(0, 0)))
    tokenizer = t5.Tokenizer(pieces)
    model = {"unet": new_unet(FIRST), "text": new_text(len(pieces))}
    if recipe.init:
        given = Path(recipe.init)
        model["unet"].load_state_dict(load_part(given / "unet", "adm", torch.float32).state_dict())
        model["text"] = load_part(given / "text_encoder", "t5", torch.float32)
    model = nn.ModuleDict(model).to(device, memory_format=torch.channels_last)
    stage = deepfloyd.Stage(model["unet"], SCHEDULE, SIDES[0])

    def read(text, texts):
        return text(*(x.to(device) for x in tokenizer(texts)))

    def loss(step, _):
        index, told, t, noise, _ = draws(recipe, scenes, (3, stage.size, stage.size), step, mixed)
        x = deepfloyd.shrink(pictures[index].to(device) / 127.5 - 1, stage)
        x, t, noise = (to_channels_last(y.to(device)) for y in (x, t, noise))
        return stage_loss(model["unet"], x, read(model["text"], told), t, noise)

    prompts, image, noise = held_out(recipe, 16, device)

    def sheet(average):
        states = read(average["text"], [""] * 16 + prompts)
        x = sample_stage(average["unet"], states, noise[..., : stage.size, : stage.size])
        return torch.cat([deepfloyd.shrink(image, stage), x]).cpu().unflatten(0, (4, 8)) / 2 + 0.5

    average = train.fit("if-1", model, loss, sheet, recipe, out, resume)
    folder = out / "model" / "IF-I"
    save_part(average["unet"], folder / "unet", torch.float16, FIRST)
    save_part(average["text"], folder / "text_encoder", torch.float16, TEXT, vocab_size=len(pieces))
    special = [{"id": i, "content": piece} for i, (piece, _, kind) in enumerate(pieces) if kind != t5.NORMAL]
    words = {"type": "Unigram", "unk_id": 2, "vocab": [[piece, score] for piece, score, _ in pieces]}
    write_json(folder / "tokenizer/tokenizer.json", {"normalizer": None, "added_tokens": special, "model": words})
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)


def train_second(recipe, out, resume, device):
    """Stage II, on parts of pictures, beside the truth at stage I's size -> OUT/model/IF-II, as fp16"""
    folder = out / "model" / "IF-I"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no first stage in {out} yet: first python -m reproduce.train_toys if-1 "
                                f"--out {out}")
    text = load_part(folder / "text_encoder", "t5", torch.float32, device)
    tokenizer = t5.Tokenizer.load(folder / "tokenizer")
    scenes, pictures, mixed = cache_pictures(recipe, out, device)
    model = new_unet(SECOND).to(device, memory_format=torch.channels_last)
    first = deepfloyd.Stage(None, SCHEDULE, SIDES[0])

    def read(texts):
        return text(*(x.to(device) for x in tokenizer(texts)))

    def loss(step, _):
        index, told, t, noise, g = draws(recipe, scenes, (3, CROP, CROP), step, mixed)
        x = pictures[index].to(device) / 127.5 - 1
        more = torch.randn(x.shape, generator=g)
        beside = deepfloyd.enlarge(deepfloyd.shrink(x, first), x.shape[-2:], more)
        top, left = torch.randint(SIDES[1] - CROP + 1, (2,), generator=g).tolist()
        x, beside = (y[..., top : top + CROP, left : left + CROP] for y in (x, beside))
        x, t, noise, beside = (to_channels_last(y.to(device)) for y in (x, t, noise, beside))
        return stage_loss(model, x, read(told), t, noise, beside)

    prompts, image, noise = held_out(recipe, 8, device)
    small = deepfloyd.shrink(image, first)
    beside = deepfloyd.enlarge(small, image.shape[-2:], noise.flip(0))

    def sheet(average):
        x = sample_stage(average, read([""] * 8 + prompts), noise, beside)
        seen = F.interpolate(small, image.shape[-2:], mode="nearest")
        return torch.stack([image, seen, x]).cpu() / 2 + 0.5

    average = train.fit("if-2", model, loss, sheet, recipe, out, resume)
    save_part(average, out / "model/IF-II/unet", torch.float16, SECOND)
    write_json(out / "model/IF-II/scheduler/scheduler_config.json", SCHEDULER)
