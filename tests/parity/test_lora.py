"""checkpoints/lora.py against diffusers: `load_lora_weights` and `fuse_lora`, which need peft, on the same files."""

import pytest
import torch

import sd
from checkpoints.lora import merge_lora
from tests import loras, small

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft", reason="diffusers reads no LoRA without peft")

PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sd2": diffusers.StableDiffusionPipeline,
             "base": diffusers.StableDiffusionXLPipeline}
# Layers that diffusers' own conversion of kohya's names knows
KNOWN = "attn[12]|ff.net|proj_in|proj_out|self_attn|mlp|conv1|conv2|conv_shortcut|time_emb_proj|samplers"


def open_peer(folders, kind):
    pipe = PIPELINES[kind].from_pretrained(folders / kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(folders, kind, file, weight, lora):
    """Weights of every changed layer of ours and of the peer's, both with the file merged."""
    model, peer = sd.load(folders / kind), open_peer(folders, kind)
    old = loras.weights(model)
    peer.load_lora_weights(str(file.parent), weight_name=file.name)
    peer.fuse_lora(lora_scale=weight)
    peer.unload_lora_weights()
    merge_lora(model, file, weight)
    changed = 0
    for (part, name), W in loras.weights(model).items():
        tensors = getattr(peer, part).state_dict()
        # transformers 5 names the layers of a plain text encoder without text_model.
        theirs = tensors.get(f"{name}.weight", tensors.get(f"{name.removeprefix('text_model.')}.weight"))
        assert small.relative_error(W, theirs) <= 1e-4, name
        changed += not torch.equal(W, old[part, name])
    assert changed == len(lora)


KOHYA = [("sd1", loras.kohya), ("sd2", loras.kohya), ("base", loras.kohya),
         ("base", loras.original)]  # diffusers takes the latter of an XL alone


@pytest.mark.parametrize("kind, write", KOHYA)
def test_kohyas_layout(tmp_path, folders, kind, write):
    model = sd.load(folders / kind)
    lora = loras.make(model, only=KNOWN)
    compare(folders, kind, loras.save(tmp_path / "it.safetensors", write(lora, model)), 0.7, lora)


@pytest.mark.parametrize("kind, endings, dora", [
    ("sd1", "PEFT", None), ("base", "dots", None), ("sd2", "processor", None), ("base", "PEFT", "out")])
def test_diffusers_own_layouts(tmp_path, folders, kind, endings, dora):
    """Which have no alpha. A DoRA at weight 1, where all agree on what it is; of kohya's, diffusers leaves out the
    magnitudes. That every layout is the same in every model, tests/test_lora.py holds."""
    model = sd.load(folders / kind)
    lora = loras.make(model, alpha=None, dora=dora, only="unet.*(attn[12]|ff.net|conv1|proj_in)" if dora else KNOWN)
    file = loras.save(tmp_path / "it.safetensors", loras.diffusers(lora, model, endings))
    compare(folders, kind, file, 1.0 if dora else 0.7, lora)


def test_a_file_that_diffusers_wrote(tmp_path, folders):
    """Of layers trained by PEFT, with an alpha that is said beside the tensors."""
    peft = pytest.importorskip("peft")
    pipe = open_peer(folders, "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "conv1", "proj_in"],
                             alpha_pattern={"conv1": 2})
    pipe.unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    more = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **more)
    lora = loras.make(sd.load(folders / "base"), only=r"unet.*(to_q|conv1|proj_in)$")
    compare(folders, "base", tmp_path / "pytorch_lora_weights.safetensors", 0.7, lora)
