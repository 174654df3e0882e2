"""Files that are damaged, hostile, or something else than a Stable Diffusion: errors of one line, and no code runs."""

import json
import os
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import clip
import sd
from checkpoints import read
from checkpoints.parts import load_part
from tests import small
from toy.vocabulary import learn_bpe


def assert_refused(path, *words, error=ValueError, load=sd.load, **options):
    with pytest.raises(error) as info:
        load(path, **options)
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
    for content in ([1, 2], "text", torch.ones(3), torch.nn.Parameter(torch.ones(3)), None):
        torch.save(content, tmp_path / "list.pt")
        assert_refused(tmp_path / "list.pt", "no tensors")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    assert_refused(tmp_path / "numbered.pt", "no tensors")
    save_file({}, tmp_path / "none.safetensors")
    assert_refused(tmp_path / "none.safetensors", "no tensors")
    endless = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.ckpt")
    assert_refused(tmp_path / "endless.ckpt", "no tensors")
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(3, 3)}, file)
    assert_refused(file, "not a whole Stable Diffusion", "lora_unet_down_blocks_0")
    save_file({k: v for k, v in tensors.items() if k.startswith("first_stage_model.")}, file)
    assert_refused(file, "not a whole Stable Diffusion", "model.diffusion_model.*")
    save_file({"conditioner.embedders.0.x": torch.ones(3)}, file)
    assert_refused(file, "not a whole Stable Diffusion", "model.diffusion_model.*")


def test_tensors_that_do_not_fit(tmp_path):
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".safetensors")
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"

    def write(change):
        save_file({k: v.contiguous() for k, v in ({**tensors} | change).items() if v is not None}, file)
        return file

    assert_refused(write({name: None}), "1 missing tensors", "mid_block.resnets.0.conv1.weight", "unet")
    for more, x in (("input_blocks.0.0.op.weight", torch.ones(3)), ("a.in_proj_weight", torch.tensor(1.0))):
        assert_refused(write({f"model.diffusion_model.{more}": x}), "1 unexpected", "unet")
    assert_refused(write({name: torch.ones(2, 3)}), "1 misshapen tensors", "(2, 3) instead of (64, 64, 3, 3)")
    assert_refused(write({f"model.diffusion_model.control_{i}.weight": torch.ones(1) for i in range(9)}),
            "9 unexpected", "control_0")
    with pytest.warns(UserWarning, match=r"2 tensors are of no part of the model .* embedding_manager\.bias"):
        sd.load(write({"embedding_manager.bias": torch.ones(9), "embedding_manager.weight": torch.ones(3, 3)}))
    assert_refused(write({"model.diffusion_model.conv_in.weight": None, "model.diffusion_model.input_blocks.0.0.weight":
                   None}), "unet", "conv_in.weight")
    narrow = {k: v for k, v in tensors.items() if "cond_stage_model" not in k}
    narrow |= small.to_original(replace_text(small.stable_diffusion(), replace(small.TEXT, width=128, heads=2)))
    save_file(narrow, file)
    assert_refused(file, "do not fit", "128")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_numbers_that_are_not_floating_point(tmp_path, dtype):
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".safetensors")
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for changed in ({name: tensors[name].to(dtype)}, {k: v.to(dtype) for k, v in tensors.items()}):
        save_file({k: v.contiguous() for k, v in (tensors | changed).items()}, file)
        for precision in (None, torch.float32):
            assert_refused(file, "other than floating-point", str(dtype), dtype=precision)


@pytest.mark.parametrize("format", [".safetensors", ".ckpt", "legacy"])
@pytest.mark.parametrize("name", ["model.ckpt", "MODEL.SAFETENSORS"])
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
                          ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "unet"),
                          ({"block_out_channels": 32}, "unet"),
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
                         ({"beta_start": "0.00085"}, "scheduler_config.json"),
                         ({"steps_offset": 1.0}, "offset of 0 or 1")):
        scheduler.write_text(json.dumps(good | change))
        assert_refused(tmp_path, "scheduler_config.json", says)
    scheduler.write_text("\ufeff" + json.dumps(good), encoding="utf-8")  # as some editors begin a file
    sd.load(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    assert_refused(tmp_path, "text_encoder_2/", error=FileNotFoundError)
    index.unlink()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(tmp_path, "no weights", "vae", error=FileNotFoundError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for all: what a test changes in it, it puts right again."""
    folder = tmp_path_factory.mktemp("saved")
    sd.save(small.stable_diffusion(), folder)
    return folder


NO_NUMBERS = ["10", None, -1, 0.18, True, [1], {"a": 1}, 10**30, 2**63, 1e300, float("nan"), [[]]]


@pytest.mark.parametrize("part, key, more", [
    ("unet", "layers_per_block", [10**6, 10**9, 0]), ("unet", "transformer_layers_per_block", [10**6, 10**9]),
    ("unet", "attention_head_dim", [10**6, 3, 0]), ("unet", "norm_num_groups", [7, 0]),
    ("unet", "sample_size", [10**9, "64", ["x"]]),
    ("unet", "cross_attention_dim", [10**9]), ("unet", "in_channels", [10**9, 0]),
    ("vae", "layers_per_block", [10**6, 10**9]), ("vae", "norm_num_groups", [0]), ("vae", "latent_channels", [0]),
    ("vae", "scaling_factor", [0, 10**400, float("inf")]), ("vae", "sample_size", [10**9]),
    ("text_encoder", "num_hidden_layers", [10**6, 10**9]), ("text_encoder", "num_attention_heads", [10**6, 0]),
    ("text_encoder", "eos_token_id", []), ("text_encoder", "vocab_size", [10**6]),
    ("text_encoder", "max_position_embeddings", [10**6, 0]), ("text_encoder", "hidden_size", [10**6, 0]),
    ("scheduler", "beta_start", [True, 10**400, float("nan")]), ("scheduler", "beta_end", [[0.012]]),
    ("scheduler", "beta_schedule", [[1]]),
    ("scheduler", "prediction_type", [["epsilon"]]), ("scheduler", "num_train_timesteps", ["1000"]),
    ("scheduler", "timestep_spacing", ["sideways", ["leading"]]), ("scheduler", "original_inference_steps", [100]),
])
def test_values_that_no_network_has(saved, part, key, more):
    """They are told before anything of that size is built."""
    config = saved / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    good = json.loads(config.read_text())
    default = key in ("sample_size", "scaling_factor", "eos_token_id", "attention_head_dim")
    lists = key in ("sample_size", "transformer_layers_per_block", "attention_head_dim")

    def load(path):
        if part != "scheduler":
            load_part(path / part, part)  # in most cases it is told here, before the other parts are read
        sd.load(path)

    for value in more if part == "scheduler" else NO_NUMBERS + more:
        if value is None and default or value == [1] and lists or value == 0.18 and key == "scaling_factor":
            continue
        config.write_text(json.dumps(good | {key: value}))
        assert_refused(saved, part, load=load)
    config.write_text(json.dumps(good))


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


class Rebuilt:
    """Pickled as a call of one of PyTorch's functions that build tensors."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(folder):
    """-> {what is wrong: file}"""
    g = torch._utils
    storage = torch.zeros(16).storage()
    ordinary = OrderedDict()
    values = {
        "longer than stored": Rebuilt(g._rebuild_tensor_v2, storage, 0, (17,), (1,), False, ordinary),
        "longer by stride": Rebuilt(g._rebuild_tensor_v2, storage, 0, (4,), (9,), False, ordinary),
        "beyond by offset": Rebuilt(g._rebuild_tensor_v2, storage, 16, (1,), (1,), False, ordinary),
        "before its storage": Rebuilt(g._rebuild_tensor_v2, storage, -1, (1,), (1,), False, ordinary),
        "negative": Rebuilt(g._rebuild_tensor_v2, storage, 0, (-4,), (1,), False, ordinary),
        "a hundred thousand dimensions": Rebuilt(g._rebuild_tensor_v2, storage, 0, (1,) * 10**5, (1,) * 10**5, False,
                                                 ordinary),
        "text": Rebuilt(g._rebuild_tensor_v2, "storage", 0, (4,), (1,), False, ordinary),
        "sparse": torch.ones(4, 4).to_sparse(),
        "meta": torch.ones(4, 4, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
    }
    files = {}
    for what, value in values.items():
        files[what] = folder / f"{what}.ckpt"
        torch.save({"state_dict": {"w": value}}, files[what])
    return files


def test_tensors_that_are_none(tmp_path):
    for what, file in hostile_pickles(tmp_path).items():
        with pytest.raises(ValueError, match="damaged") as e:
            read.read_tensors(file)
        assert "\n" not in str(e.value) and "weights_only" not in str(e.value) and len(str(e.value)) < 500, what


def test_memory_and_time_are_bounded_by_what_a_file_holds(tmp_path):
    """What takes gigabytes, or for ever, where PyTorch reads it."""
    laughs = b"\x80\x02)q\x00" + b"".join(b"h%c%s\x86q%c" % (i, b"h%c" % i, i + 1) for i in range(100)) + b")R."
    for name, program in {
        "bytes": b"\x80\x02cbuiltins\nbytearray\n(\x8a\x05\x00\xf2\x05\x2a\x01tR.",  # bytearray(5e9)
        "laughs": laughs,  # a tuple of two of a tuple of two ..., called: its name would have 2**100 letters
        "memo": b"\x80\x02)r\xff\xff\xff\xff.", "attribute": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00"
        b"itemsK\x01sb.", "cut": b"\x80", "nothing": b"\x80\x02.",
    }.items():
        with zipfile.ZipFile(tmp_path / f"{name}.ckpt", "w") as archive:
            archive.writestr("a/data.pkl", program)
        (tmp_path / f"{name} plain.ckpt").write_bytes(program)
        for file in (f"{name}.ckpt", f"{name} plain.ckpt"):
            with pytest.raises(ValueError, match="damaged|no tensors"):
                read.read_tensors(tmp_path / file)

    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="compressed archive"):
        read.read_tensors(tmp_path / "bomb.ckpt")

    # One number, said to be 2**30 of them, is no more than a number until it is cast.
    file, tensors, _ = small.original_file(tmp_path, "sd1", ".ckpt")
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    torch.save(tensors | {name: torch.zeros(1, dtype=torch.float16).expand(2**24, 64)}, file)
    assert_refused(file, "larger than what is stored of it")

    for shape in ([1] * 10**5, [0, 2**64 - 1]):
        contents = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 if shape[0] else 0]}}
        header = json.dumps(contents).encode()
        (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(contents["a"][
            "data_offsets"][1]))
        with pytest.raises(ValueError, match="damaged|not a whole"):
            read.read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64,
                                   torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_pickles_are_read_as_pytorch_reads_them(tmp_path, zipped, dtype):
    """Views, shared storages, parameters, strides, empty and scalar tensors: the same numbers, bit for bit."""
    base = (torch.arange(60).reshape(3, 4, 5) % 2).to(dtype)
    if dtype.itemsize == 1 and dtype.is_floating_point and not zipped:
        return  # PyTorch cannot write that
    content = {"whole": base, "view": base[1:, 2], "turned": base.permute(2, 0, 1), "empty": base[:0],
               "odd": base[0, 0, 1:], "scalar": base[0, 0, 1], "same": base, "wide": base[:1, :1].expand(3, 4, 5)}
    if dtype.is_floating_point:
        content |= {"p": torch.nn.Parameter(base), "q": torch.nn.Parameter(base[0], requires_grad=False)}
        content["p"].note = "kept by _rebuild_parameter_with_state"
    module = OrderedDict(content)
    module._metadata = {"version": 1}
    torch.save({"state_dict": module, "epoch": 3}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    got, want = read.read_tensors(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == dtype and tensor.stride() == want[name].stride()
        assert torch.equal(tensor.float(), want[name].float()), name
    assert got["same"].data_ptr() == got["whole"].data_ptr()


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


def test_tokenizers_that_are_damaged_or_another_model_s(tmp_path):
    save_file(small.to_original(small.stable_diffusion()), tmp_path / "model.safetensors")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert_refused(tmp_path / "model.safetensors", "tokenizer", "damaged")
    clip.Tokenizer(*learn_bpe([*small.CAPTIONS, "other words here altogether"], 700)).save(tmp_path)
    assert_refused(tmp_path / "model.safetensors", "not the text encoder's")
