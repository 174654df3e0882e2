"""Small parts of a DeepFloyd IF, with random weights and a made-up vocabulary, and their files."""

import base64
import json
import random
import struct
import zlib

import torch
from safetensors.torch import save_file

from models import adm, t5
from tests.small import CAPTIONS, randomise

# What SentencePiece 0.2.3 makes of seven rules: the ligature fi, a tab, e with a combining acute, a circled 1, a square
# km, an ideographic space, and a space of no width, which goes
CHARMAP = zlib.decompress(base64.b64decode(
    "eNol03fwD2QYAPDn98Ud5/wjznaUZKWfvUrL3pItm2xltPEj2XsVRT8je2bvXdkUWkLUVXeiSVb1+fLefe557n2eu/d977k3MkZEoYgs2SJSItKO5k7E"
    "8EwRWeVpxRIxvkpEepZIrrQMyb2HI+apZ5avDL2vS/okwlbaA5qyk5Mc5GLqnUTkEXOTj7wUID+TUhNRUCx8/wrxEA/iiCjCIxSlOMUoSQkepRSPUZoy"
    "pFKOslSgPJWoiCdEZapRlSd4nCepztM8xbM8Q01qUJta1KUO9alHQxrQmEY0pQnNeI7mPE9LWtCaVrSlDS/Qjg60pxMd6UJnutGVF+lOT3rQm170TfaM"
    "SUR/sR8v8xIDGcBgBvEqr2BE8Rpv8gZDeIthDGV4cri8zQjeYSSjGcVYxjCecUxkApOTM0zOmClMZxozmcG7zGI27/E+c5jLB3zIPOaTzkIW8BGLWMJi"
    "lrGUFSxnFStZw2rWsZb1fMxGNrCZTWxlC9vZxk52sJtd7GUP+9nHQQ7wKZ9wiM84wmGOcZQTHOcUJ/mCzznDab7kLF/zFd/yDd9xjguc53sucplL/MgP"
    "/MS1HCnxi/hzsrY2JS5fSYlf5VeSNa7yO7/xJ3/wN39xg+vc5B9uc4u73OE//o17n69MdO8ZvfvG/mXxP9HIkUw="))
TEXTS = [*CAPTIONS, "", "   two  spaces ", "zebras", "日本 語", "a ﬁne\t①㎞\u3000rocket\u200bs", "cafe\u0301",
         "\U0001f642\U0001f642 x"]


def make_pieces():
    """All short parts of words in the captions, each of a probability of its own; the others are not known."""
    parts = {"▁"}
    for word in " ".join(CAPTIONS).split():
        word = "▁" + word
        parts |= {word[i : i + n] for n in range(1, 6) for i in range(len(word))}
    draw = random.Random(0)
    special = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, t5.UNKNOWN)]
    # SentencePiece stores scores in single precision.
    scores = struct.unpack(f"<{len(parts)}f", struct.pack(f"<{len(parts)}f", *(draw.uniform(-9, -3) for _ in parts)))
    return special + [(part, score, t5.NORMAL) for part, score in zip(sorted(parts), scores)]


PIECES = make_pieces()
T5 = t5.T5Config(vocab_size=len(PIECES), width=32, layers=3, heads=2, head_width=12, mlp_width=48)


def encode_field(number, value):
    """A field of a protobuf message: bytes, a float or a small int"""
    if isinstance(value, bytes):
        size = bytes([len(value) & 127 | 128, len(value) >> 7]) if len(value) > 127 else bytes([len(value)])
        return bytes([number << 3 | 2]) + size + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3, value])


def write_spiece(folder):
    """spiece.model, as SentencePiece writes it: with a trainer's settings, which nobody reads"""
    message = encode_field(2, encode_field(3, 1) + encode_field(10, 0.9995))
    for text, score, kind in PIECES:
        piece = encode_field(1, text.encode()) + encode_field(2, score)
        message += encode_field(1, piece if kind == t5.NORMAL else piece + encode_field(3, kind))
    message += encode_field(3, encode_field(1, b"nmt_nfkc") + encode_field(2, CHARMAP))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(message)


def write_json(folder, nested=False):
    """tokenizer.json, as transformers writes it"""
    charmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARMAP).decode()}
    special = [{"id": i, "content": text} for i, (text, _, kind) in enumerate(PIECES) if kind != t5.NORMAL]
    model = {"type": "Unigram", "unk_id": 2, "vocab": [[text, score] for text, score, _ in PIECES]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({
        "normalizer": {"type": "Sequence", "normalizers": [charmap]} if nested else charmap,
        "added_tokens": special, "model": model}))


# --- Both stages, in the layout of DeepFloyd's repositories ---------------------------------------

UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "gelu", "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2, "attention_head_dim": 8, "block_out_channels": [32, 64],
    "class_embed_type": None, "cross_attention_dim": 64, "cross_attention_norm": "group_norm", "encoder_hid_dim": 32,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], "in_channels": 3,
    "layers_per_block": 1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "out_channels": 6, "sample_size": 8,
    "resnet_time_scale_shift": "scale_shift", "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
ENLARGES = {
    "class_embed_type": "timestep", "in_channels": 6, "layers_per_block": [1, 2], "mid_block_scale_factor": 1 / 0.7071,
    "only_cross_attention": True, "resnet_out_scale_factor": 1 / 0.7071, "resnet_skip_time_act": True,
    "sample_size": 16, "time_embedding_act_fn": "gelu", "time_embedding_dim": 48,
}
SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001,
    "clip_sample": True, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.95, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "sample_max_value": 1.5, "thresholding": True, "variance_type": "learned_range",
}
TEXT = {
    "architectures": ["T5EncoderModel"], "d_ff": T5.mlp_width, "d_kv": T5.head_width, "d_model": T5.width,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "layer_norm_epsilon": 1e-6, "model_type": "t5",
    "num_heads": T5.heads, "num_layers": T5.layers, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "use_cache": False, "vocab_size": T5.vocab_size,
}


def write_stage(folder, second=False):
    """unet/ and scheduler/"""
    c = UNET | ENLARGES if second else UNET
    torch.manual_seed(0)
    unet = randomise(adm.ADM(adm.config_from_json(c)))
    (folder / "unet").mkdir(parents=True)
    save_file(unet.state_dict(), folder / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_file(folder / "unet/config.json", c)
    write_file(folder / "scheduler/scheduler_config.json", SCHEDULER | {"sample_max_value": 1.0 if second else 1.5})


def write_cascade(folder):
    """-> the folders of both stages. The text encoder is in two files, as the large one is."""
    first, second = folder / "IF-I", folder / "IF-II"
    write_stage(first)
    write_stage(second, second=True)
    write_spiece(first / "tokenizer")
    tensors = randomise(t5.T5(T5)).state_dict()
    write_file(first / "text_encoder/config.json", TEXT)
    names, files = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, first / "text_encoder" / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    write_file(first / "text_encoder/model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    return first, second


def write_file(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
