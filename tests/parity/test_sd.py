"""sd.py against diffusers and transformers: their conversion, the folders they write, the pictures they draw."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import samplers
import sd
import unet
from checkpoints import configs, names
from tests import small

# --- The original layout --------------------------------------------------------------------------


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


# --- The Hugging Face folder ----------------------------------------------------------------------


def peer_folder(folder, kind):
    """A folder as diffusers and transformers write it, of the weights of `small`."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    model = small.stable_diffusion(kind, prediction)
    sd.save(model, folder / "ours")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "ours")
    pipe.unet.register_to_config(sample_size=24)
    pipe.scheduler = diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                             skip_prk_steps=True, prediction_type=prediction)
    pipe.save_pretrained(folder)
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


# --- Whole pipelines ------------------------------------------------------------------------------


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

    z = samplers.run_sampler(guided, noise, samplers.make_sampler("ddim", model.schedule, k))
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
    known, sampler = torch.cat([repaint[..., ::2, ::2], seen], 1), samplers.make_sampler("ddim", model.schedule, k)
    denoise = model.denoiser("a red circle", "cats", guidance, known, sampler.timesteps)
    got = model.decode(samplers.run_sampler(denoise, noise, sampler)) / 2 + 0.5
    assert (got.clamp(0, 1) - torch.from_numpy(want).permute(0, 3, 1, 2)).abs().max() <= 2 / 255
