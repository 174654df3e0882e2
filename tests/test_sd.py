"""sd.py: every layout in, the standard folder out, and what happens to files that are something else."""

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clip
import diffusion
import sd
import unet
from checkpoints import configs, names, read
from checkpoints.parts import load_part
from tests import small


@pytest.mark.parametrize("kind", small.UNETS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_original_layout(tmp_path, kind, suffix):
    file, _, model = small.original_file(tmp_path, kind, suffix)
    got = sd.load(file)
    assert (got.unet.config, got.vae.config) == (small.UNETS[kind], small.VAE)
    assert got.text.config == small.TEXTS[kind]
    assert got.size == 64 * 2
    assert got.tokenizer.pad == model.tokenizer.pad
    assert not any(p.requires_grad for part in (got.unet, got.vae, got.text) for p in part.parameters())
    assert small.same_model(got, model)
    assert all(n.dtype == torch.float32 for n in small.compute(got))
    half = sd.load(file, dtype=torch.float16)
    assert {p.dtype for part in (half.unet, half.vae, half.text) for p in part.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", small.UNETS)
@torch.no_grad()
def test_original_layout_as_diffusers_converts_it(tmp_path, kind):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    file, tensors, _ = small.original_file(tmp_path, kind, ".safetensors")
    got = sd.load(file)
    context, predicted, encoded, decoded = small.compute(got)

    c = configs.unet_config_to_json(small.UNETS[kind])
    peer = diffusers.UNet2DConditionModel.from_config(c).eval()
    peer.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(tensors), c))
    g = torch.Generator().manual_seed(2)
    z = torch.randn(1, small.UNETS[kind].in_channels, 8, 8, generator=g)
    x = torch.rand(1, 3, 16, 16, generator=g) * 2 - 1
    assert small.relative_error(predicted, peer(z, torch.tensor([500]), context).sample) <= 1e-4

    peer = diffusers.AutoencoderKL.from_config(configs.vae_config_to_json(small.VAE)).eval()
    peer.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(tensors), peer.config))
    assert small.relative_error(encoded, peer.encode(x).latent_dist.mean * 0.18215) <= 1e-4
    assert small.relative_error(decoded, peer.decode(encoded / 0.18215).sample) <= 1e-4

    layers = 3 if kind == "sd2" else 2
    c = transformers.CLIPTextConfig(**configs.text_config_to_json(replace(small.TEXTS[kind], layers=layers)))
    peer = transformers.CLIPTextModel(c).eval()
    if kind == "sd2":
        state = convert.convert_open_clip_checkpoint(peer, dict(tensors))
    else:
        state = convert.convert_ldm_clip_checkpoint(dict(tensors))
    short = not any(k.startswith("text_model.") for k in peer.state_dict())  # transformers 5 has dropped the prefix
    state = {k.removeprefix("text_model.") if short else k: v for k, v in state.items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not missing and all("position_ids" in k or "text_projection" in k for k in unexpected)
    out = peer(got.tokenizer(["a blue circle"]), output_hidden_states=True)
    norm = (peer if short else peer.text_model).final_layer_norm
    want = norm(out.hidden_states[-2]) if kind == "sd2" else out.last_hidden_state
    assert small.relative_error(context, want) <= 1e-4


def test_xl_names_as_diffusers_converts_them():
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = unet.UNetConfig(channels=(32, 32, 64), depth=(0, 1, 2), mid_depth=2, heads=None, head_width=16, added=50,
                             linear_proj=True, context=40, layers=1)
    model = small.stable_diffusion()
    model.unet = unet.UNet(config)
    tensors = {k: v for k, v in small.to_original(model).items() if k.startswith(names.PREFIX["unet"])}
    got = names.translate("unet", {k.removeprefix(names.PREFIX["unet"]): v for k, v in tensors.items()})
    want = convert.convert_ldm_unet_checkpoint(dict(tensors), configs.unet_config_to_json(config))
    assert got.keys() == want.keys() == model.unet.state_dict().keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_v_prediction_and_the_native_size(tmp_path):
    file, _, _ = small.original_file(tmp_path, "sd2", ".safetensors")
    assert (sd.load(file).schedule.prediction, sd.load(file).size) == ("epsilon", 64 * 2)
    got = sd.load(file, prediction="v_prediction")
    assert (got.schedule.prediction, got.size) == ("v_prediction", 96 * 2)
    named = file.rename(tmp_path / "v2-1_768-ema-pruned.safetensors")
    assert sd.load(named).schedule.prediction == "v_prediction"
    assert sd.load(named, prediction="epsilon").schedule.prediction == "epsilon"


def test_weights_stay_in_the_file(tmp_path):
    """Loaded as stored, the parameters are a mapping of the file: no page of it is private memory."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs Linux")
    big = torch.randn(2**24)  # 64 MiB
    save_file({"a": big}, tmp_path / "a.safetensors")
    torch.save({"a": big}, tmp_path / "a.ckpt")

    def mapping(address):
        """-> (the file that is mapped there, the KiB of it that are private memory)"""
        here = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, *rest = line.split(maxsplit=5)
            if not first.endswith(":"):
                start, end = (int(x, 16) for x in first.split("-"))
                here, name = start <= address < end, rest[-1]
            elif here and first == "Anonymous:":
                return Path(name), int(rest[0])

    for file in ("a.safetensors", "a.ckpt"):
        tensor = read.read_tensors(tmp_path / file)["a"]
        assert torch.equal(tensor, big)
        for address in (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1):
            assert mapping(address) == ((tmp_path / file).resolve(), 0)


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face folder


def peer_folder(folder, kind):
    """A folder as diffusers and transformers write it, of the weights of `small`."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    model = small.stable_diffusion(kind)
    c = configs.unet_config_to_json(small.UNETS[kind]) | {"sample_size": 24}
    peer = diffusers.UNet2DConditionModel.from_config(c)
    peer.load_state_dict(model.unet.state_dict())
    peer.save_pretrained(folder / "unet")
    peer = diffusers.AutoencoderKL.from_config(configs.vae_config_to_json(small.VAE))
    peer.load_state_dict(model.vae.state_dict())
    peer.save_pretrained(folder / "vae")
    peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs.text_config_to_json(small.TEXTS[kind])))
    short = not any(k.startswith("text_model.") for k in peer.state_dict())
    peer.load_state_dict({k[11:] if short else k: v for k, v in model.text.state_dict().items()})
    peer.save_pretrained(folder / "text_encoder")
    diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True,
                            prediction_type="v_prediction" if kind == "sd2" else "epsilon",
                            ).save_pretrained(folder / "scheduler")
    model.tokenizer.save(folder / "tokenizer")
    return model


@pytest.mark.parametrize("kind", small.UNETS)
def test_folder_that_the_peers_wrote(tmp_path, kind):
    model = peer_folder(tmp_path, kind)
    got = sd.load(tmp_path)
    assert (got.unet.config, got.vae.config, got.text.config) == (small.UNETS[kind], small.VAE, small.TEXTS[kind])
    assert got.schedule.prediction == ("v_prediction" if kind == "sd2" else "epsilon")
    assert got.size == 24 * 2 and got.tokenizer.pad == model.tokenizer.pad
    assert small.same_model(got, model)


def test_other_files_in_a_folder(tmp_path):
    """Half precision, shards, pickles, old attention names, and the text encoder's older key names."""
    model = peer_folder(tmp_path, "sd1")
    folder, file = tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert small.same_model(sd.load(tmp_path), model)
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    names = [*tensors]
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({k: tensors[k] for k in held}, folder / shard)
    index = {"weight_map": {k: shard for shard, held in shards.items() for k in held}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert small.same_model(sd.load(tmp_path), model)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        sd.load(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    (folder / "config.json").unlink()  # then the tensors say it
    assert sd.load(tmp_path).size == 128
    assert small.same_model(sd.load(tmp_path), model)

    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for k, v in load_file(file).items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            k = k.replace(new, name)
        old[k] = v
    save_file(old, file)
    save_file(model.text.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
              tmp_path / "text_encoder" / "model.safetensors")
    assert small.same_model(sd.load(tmp_path), model)


@pytest.mark.parametrize("kind", small.UNETS)
def test_save_and_load(tmp_path, kind):
    model = small.stable_diffusion(kind)
    sd.save(model, tmp_path)
    got = sd.load(tmp_path)
    assert small.same_model(got, model)
    assert (got.unet.config, got.vae.config, got.text.config) == (small.UNETS[kind], small.VAE, small.TEXTS[kind])
    assert got.size == 16 and got.tokenizer.vocab == small.VOCAB and got.tokenizer.pad == model.tokenizer.pad
    sd.save(got, tmp_path, dtype=torch.float16)  # over the very files that `got` is a mapping of
    assert small.same_model(got, model)
    assert sd.load(tmp_path).unet.conv_in.weight.dtype == torch.float16
    assert not [f for f in tmp_path.rglob(".*")]
    part = load_part(tmp_path / "vae", "vae", dtype=torch.float32)
    assert small.relative_error(part.decode(torch.ones(1, 4, 4, 4)), model.vae.decode(torch.ones(1, 4, 4, 4))) < 1e-2


@pytest.mark.parametrize("name", unet.CONFIGS)
def test_config_json_gives_the_configuration_back(name):
    diffusers = pytest.importorskip("diffusers")
    config = unet.CONFIGS[name]
    c = json.loads(json.dumps(configs.unet_config_to_json(config)))
    assert configs.unet_config_from_json(c) == config
    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel.from_config(c)
        assert peer.state_dict().keys() == unet.UNet(config).state_dict().keys()
    spelled_out = json.loads(peer.to_json_string())  # with all of its defaults
    assert configs.unet_config_from_json(spelled_out) == config


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_same_picture_as_the_peer_pipeline(tmp_path, prediction):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    model = small.stable_diffusion("sd1", prediction)
    sd.save(model, tmp_path)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert not isinstance(pipe.scheduler, diffusers.PNDMScheduler)
    noise, k, guidance = torch.randn(1, 4, 8, 8), 5, 4.0
    options = {"prompt": "a red circle", "negative_prompt": "cats", "num_inference_steps": k, "latents": noise,
               "guidance_scale": guidance, "height": 16, "width": 16}
    want = torch.from_numpy(pipe(**options, output_type="np").images).permute(0, 3, 1, 2)

    context = model.unet.keys_values(model.encode_prompt(["cats", "a red circle"]))

    def guided(z, t):
        without, given = model.unet(z.repeat(2, 1, 1, 1), t.repeat(2), context).chunk(2)
        return without + guidance * (given - without)

    z = diffusion.run_sampler(guided, noise, diffusion.make_sampler("ddim", model.schedule, k))
    got = (model.decode(z) / 2 + 0.5).clamp(0, 1)
    assert (got - want).abs().max() <= 2 / 255
    assert want.std() > 0.05
    assert small.relative_error(z, pipe(**options, output_type="latent").images) <= 1e-4


@torch.no_grad()
def test_same_picture_as_the_peer_inpainting_pipeline(tmp_path):
    """The mask and the masked picture in the right order, and polarity. (The latter's latent the peer would draw.)"""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    model = small.stable_diffusion("inpainting")
    sd.save(model, tmp_path)
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    image, noise, k, guidance = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8), 5, 4.0
    repaint = torch.zeros(1, 1, 16, 16)
    repaint[..., 2:10, 6:] = 1
    seen = model.encode_image(image * (1 - repaint))
    want = pipe(prompt="a red circle", negative_prompt="cats", image=image, mask_image=repaint, height=16, width=16,
                masked_image_latents=seen, strength=1.0, num_inference_steps=k, guidance_scale=guidance, latents=noise,
                output_type="np").images
    known, sampler = torch.cat([repaint[..., ::2, ::2], seen], 1), diffusion.make_sampler("ddim", model.schedule, k)
    denoise = model.denoiser("a red circle", "cats", guidance, known, sampler.timesteps)
    got = model.decode(diffusion.run_sampler(denoise, noise, sampler)) / 2 + 0.5
    assert (got.clamp(0, 1) - torch.from_numpy(want).permute(0, 3, 1, 2)).abs().max() <= 2 / 255


def test_the_posterior(tmp_path):
    model = small.stable_diffusion()
    x, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    mean, logvar = model.vae.encode(x)
    assert torch.equal(model.encode_image(x), mean * 0.18215)
    want = (mean + (0.5 * logvar).exp() * noise) * 0.18215
    torch.testing.assert_close(model.encode_image(x, noise), want)


# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line that says what is wrong


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
        for content, words in ((b"", "empty"), (whole[: len(whole) // 2], says), (b"<html>hello</html>" * 9, says)):
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
    assert_refused(write({"something.else": torch.ones(1)}), "1 unexpected", "something.else")
    assert_refused(write({"model.diffusion_model.conv_in.weight": None, "model.diffusion_model.input_blocks.0.0.weight":
                   None}), "unet", "conv_in.weight")
    narrow = {k: v for k, v in tensors.items() if "cond_stage_model" not in k}
    narrow |= small.to_original(replace_text(small.stable_diffusion(), replace(small.TEXT, width=128, heads=2)))
    save_file(narrow, file)
    assert_refused(file, "do not fit", "128")


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


def test_no_tokenizer(tmp_path):
    save_file(small.to_original(small.stable_diffusion()), tmp_path / "model.safetensors")
    got = sd.load(tmp_path / "model.safetensors")
    got.decode(got.encode_image(torch.zeros(1, 3, 16, 16)))
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt") as info:
        got.encode_prompt(["a cat"])
    assert str(tmp_path) in str(info.value) and clip.ARCHIVE in str(info.value)
    sd.save(small.stable_diffusion(), tmp_path / "folder")
    for f in (tmp_path / "folder" / "tokenizer").iterdir():
        f.unlink()
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt") as info:
        sd.load(tmp_path / "folder").encode_prompt(["a cat"])
    assert str(tmp_path / "folder" / "tokenizer") in str(info.value)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert_refused(tmp_path / "model.safetensors", "tokenizer", "damaged")


def test_a_tokenizer_of_another_model(tmp_path):
    save_file(small.to_original(small.stable_diffusion()), tmp_path / "model.safetensors")
    clip.Tokenizer(*clip.learn_bpe([*small.CAPTIONS, "other words here altogether"], 700)).save(tmp_path)
    assert_refused(tmp_path / "model.safetensors", "not the text encoder's")
