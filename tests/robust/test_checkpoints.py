"""Files that are damaged, hostile, or something else than a Stable Diffusion: errors of one line, and no code runs."""

import json
import os
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import clip
import sd
from tests import small
from toy.vocabulary import learn_bpe


def assert_refused(path, *words, error=ValueError, **options):
    with pytest.raises(error) as info:
        sd.load(path, **options)
    message = str(info.value)
    assert "\n" not in message and len(message) < 700, message
    assert all(word in message for word in words), message


def test_files_that_are_no_checkpoint(tmp_path):
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".safetensors")
    assert_refused(tmp_path / "absent.safetensors", "absent.safetensors", error=FileNotFoundError)
    assert_refused(tmp_path / "absent", "absent", error=FileNotFoundError)
    assert_refused(tmp_path, "unet/", error=FileNotFoundError)
    (tmp_path / "text.txt").write_text("hello")
    assert_refused(tmp_path / "text.txt", "not a checkpoint")
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    for suffix, says in ((".safetensors", "not a whole safetensors file"), (".ckpt", "is damaged")):
        whole = (tmp_path / f"model{suffix}").read_bytes()
        cut = tmp_path / f"cut{suffix}"
        for content, words in ((b"", "empty"), (whole[: len(whole) // 2], says), (b"<html>hi</html>" * 9, "web page"),
                               (b"\n<!DOCTYPE html>\n", "web page"), (b"version https://git-lfs.github.com/spec/v1\n",
                               "Git LFS"), (b'{"error": "denied"}', "not a checkpoint"), (b"\x80\x02", "damaged"),
                               (b"PK\x03\x04", "damaged")):
            cut.write_bytes(content)
            assert_refused(cut, cut.name, words)
    torch.save([1, 2], tmp_path / "list.pt")
    assert_refused(tmp_path / "list.pt", "no tensors")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    assert_refused(tmp_path / "numbered.pt", "no tensors")
    endless = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.ckpt")
    assert_refused(tmp_path / "endless.ckpt", "no tensors")
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(3, 3)}, file)
    assert_refused(file, "not a whole Stable Diffusion", "lora_unet_down_blocks_0")
    save_file({k: v for k, v in tensors.items() if k.startswith("first_stage_model.")}, file)
    assert_refused(file, "not a whole Stable Diffusion", "model.diffusion_model.*")
    save_file({"conditioner.embedders.0.x": torch.ones(3)}, file)
    assert_refused(file, "XL")


def test_tensors_that_do_not_fit(tmp_path):
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".safetensors")
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"

    def write(change):
        save_file({k: v.contiguous() for k, v in ({**tensors} | change).items() if v is not None}, file)
        return file

    assert_refused(write({name: None}), "1 missing tensors", "mid_block.resnets.0.conv1.weight", "unet")
    assert_refused(write({name: torch.ones(2, 3)}), "1 misshapen tensors", "(2, 3) instead of (64, 64, 3, 3)")
    assert_refused(write({f"model.diffusion_model.control_{i}.weight": torch.ones(1) for i in range(9)}),
            "9 unexpected", "control_0")
    with pytest.warns(UserWarning, match=r"2 tensors are of no part of the model .* denoiser\.sigmas"):
        sd.load(write({"denoiser.sigmas": torch.ones(9), "embedding_manager.weight": torch.ones(3, 3)}))
    assert_refused(write({"model.diffusion_model.conv_in.weight": None, "model.diffusion_model.input_blocks.0.0.weight":
                   None}), "unet", "conv_in.weight")
    narrow = {k: v for k, v in tensors.items() if "cond_stage_model" not in k}
    narrow |= small.to_original(replace_text(small.stable_diffusion(), replace(small.TEXT, width=128, heads=2)))
    save_file(narrow, file)
    assert_refused(file, "do not fit", "128")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_numbers_that_are_not_floating_point(tmp_path, dtype):
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".safetensors")
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for changed in ({name: tensors[name].to(dtype)}, {k: v.to(dtype) for k, v in tensors.items()}):
        save_file({k: v.contiguous() for k, v in (tensors | changed).items()}, file)
        for precision in (None, torch.float32):
            assert_refused(file, "other than floating-point", str(dtype), dtype=precision)


def test_no_tensors_at_all(tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    for name in ("none.safetensors", "none.ckpt"):
        assert_refused(tmp_path / name, "no tensors")


@pytest.mark.parametrize("format", [".safetensors", ".ckpt", "legacy"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "MODEL.SAFETENSORS", "model.download"])
def test_the_content_decides_what_a_file_is(tmp_path, format, name):
    file, tensors, model = small.original_file(tmp_path, "sd1", ".safetensors")
    if format != ".safetensors":
        torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=format == ".ckpt")
    assert small.same_model(sd.load(file.rename(tmp_path / name)), model)


def replace_text(model, config):
    model.text = clip.TextEncoder(config)
    return model


def test_folder_errors(tmp_path):
    sd.save(small.stable_diffusion(), tmp_path)
    config = tmp_path / "unet" / "config.json"
    good = json.loads(config.read_text())
    for change, words in (({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
                          ({"class_embed_type": "timestep"}, "class_embed_type"),
                          ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
                          ({"layers_per_block": [1, 1]}, "does not make a unet"),
                          ({"norm_num_groups": 0}, "does not make a unet"), ({"attention_head_dim": 0}, "unet"),
                          ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "unet"),
                          ({"block_out_channels": 32}, "unet"), ({"sample_size": "64"}, "sample_size"),
                          ({"sample_size": ["x"]}, "sample_size"),
                          ({"block_out_channels": [32, 96]}, "misshapen")):
        config.write_text(json.dumps(good | change))
        assert_refused(tmp_path, words, "unet")
    del good["block_out_channels"]
    config.write_text(json.dumps(good))
    assert_refused(tmp_path, "block_out_channels")
    for damaged in ("{", "[1]", "[" * 100_000):
        config.write_text(damaged)
        assert_refused(tmp_path, "damaged")
    config.unlink()
    sd.load(tmp_path)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    good = json.loads(scheduler.read_text())
    for change, says in (({"beta_schedule": "cosine"}, "cosine"), ({"beta_end": 0.02}, "beta_end"),
                         ({"num_train_timesteps": 4000}, "1000 steps"), ({"prediction_type": "sample"}, "sample"),
                         ({"beta_start": "0.00085"}, "scheduler_config.json")):
        scheduler.write_text(json.dumps(good | change))
        assert_refused(tmp_path, "scheduler_config.json", says)
    scheduler.write_text(json.dumps(good))
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    assert_refused(tmp_path, "XL")
    index.unlink()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(tmp_path, "no weights", "vae", error=FileNotFoundError)


class Runs:
    """What an attacker puts into a pickle: loading it calls a function."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_does_not(tmp_path, zipped):
    tensors, touched = small.to_original(small.stable_diffusion()), tmp_path / "touched"
    for content in (tensors | {"x": Runs(touched)}, {"state_dict": tensors, "callbacks": Runs(touched)}):
        torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
        assert_refused(tmp_path / "model.ckpt", "refused", "safetensors")
        assert not touched.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert touched.exists()  # it was a real one


def test_what_lightning_leaves_in_a_checkpoint_is_harmless(tmp_path, monkeypatch):
    """sd-v1-4.ckpt holds a class of pytorch_lightning, which is not installed here."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = module.ModelCheckpoint()
    state.score = 3
    model = small.stable_diffusion()
    content = {"state_dict": small.to_original(model), "callbacks": {module.ModelCheckpoint: {"best": state}}}
    torch.save(content, tmp_path / "model.ckpt")
    small.write_tokenizer(tmp_path)
    monkeypatch.undo()
    assert small.same_model(sd.load(tmp_path / "model.ckpt"), model)


def test_old_pickles_that_cannot_be_mapped(tmp_path):
    torch.save(small.to_original(small.stable_diffusion()), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    small.write_tokenizer(tmp_path / "tokenizer")
    assert small.same_model(sd.load(tmp_path / "model.pt"), small.stable_diffusion())


def test_tokenizers_that_are_damaged_or_another_model_s(tmp_path):
    save_file(small.to_original(small.stable_diffusion()), tmp_path / "model.safetensors")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert_refused(tmp_path / "model.safetensors", "tokenizer", "damaged")
    clip.Tokenizer(*learn_bpe([*small.CAPTIONS, "other words here altogether"], 700)).save(tmp_path)
    assert_refused(tmp_path / "model.safetensors", "not the text encoder's")
