"""Damaged and hostile files, made from whole ones by chance: what fuzz.py has read.

A kind is a function: what is whole, a folder, a random.Random -> a function that reads what the kind wrote there.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

# --- Damage to bytes and to JSON ------------------------------------------------------------------

EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def damage(data, rng, head=512):
    """Bytes -> bytes that differ in one place or a few, half of them near the start"""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(max(1, min(len(data), head) if rng.random() < 0.5 else len(data)))
        some, size = rng.choice([1, 4, 16, 200, 1000]), rng.choice([1, 2, 4, 8])
        how = rng.choice(["bit", "cut", "twice", "number", "random", "drop", "insert", "zeros"])
        if how == "bit" and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[at:]
        elif how == "twice":
            data[at:at] = data[at : at + some]
        elif how == "number":
            number = rng.choice(EDGES) % 256**size
            data[at : at + size] = number.to_bytes(size, rng.choice(["little", "big"]))
        elif how == "random":
            data[at : at + some] = rng.randbytes(some)
        elif how == "drop":
            del data[at : at + some]
        elif how == "insert":
            data[at:at] = rng.randbytes(some)
        else:
            data[at : at + some] = bytes(len(data[at : at + some]))
    return bytes(data)


class Raw(str):
    """JSON that json.dumps would not write"""


VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 64, 0.5, -0.0, 1e-300, 1e9, 1e300, 2**31, 2**63, 10**30, 10**6, 10**9,
    Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("1" * 5000), "", "a", "64", "\0", "\ud800", "日本", "/", ".",
    "../a",
    "x" * 5000, "\n\n", [], {}, [[]], [None], [1, 2], [0, 0, 0, 0], [1e9, 1e9], ["a", "b"], {"a": 1}, [1] * 1000,
    Raw("[" * 970 + "]" * 970), Raw("[" * 10**5), Raw('{"a":' * 10**5),
]  # fmt: skip


def write(x):
    """JSON, with what is Raw as it is"""
    if isinstance(x, Raw):
        return x
    if isinstance(x, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {write(v)}" for k, v in x.items()) + "}"
    return "[" + ", ".join(map(write, x)) + "]" if isinstance(x, list) else json.dumps(x)


def list_places(x):
    """-> [(container, key)] of all that is in it"""
    inside = [(x, key) for key in (x if isinstance(x, dict) else range(min(len(x), 50)))]
    return inside + [p for _, key in inside if isinstance(x[key], (dict, list)) for p in list_places(x[key])]


def damage_json(x, rng, values=VALUES):
    """-> bytes of JSON like x, but for a value or a few; now and then no JSON"""
    x = copy.deepcopy(x)
    for _ in range(rng.choice([1, 1, 1, 2])):
        places = list_places(x)
        if not places or rng.random() < 0.03:
            x = [copy.deepcopy(rng.choice(values))]
        inside, key = rng.choice(list_places(x))
        how = rng.choice(["set", "set", "set", "delete", "add", "swap", "wrap"])
        if type(inside[key]) in (int, float) and rng.random() < 0.5:
            how = "scale"
        if how == "delete":
            del inside[key]
        elif how == "add" and isinstance(inside, dict):
            inside[rng.choice(["about", "z", "extra", "", "__class__"])] = copy.deepcopy(rng.choice(values))
        elif how == "swap":
            other, there = rng.choice(places or [(inside, key)])
            inside[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else None
        elif how == "wrap":
            inside[key] = rng.choice([[inside[key]], {"a": inside[key]}, [inside[key]] * 3])
        elif how == "scale":
            with contextlib.suppress(OverflowError):
                inside[key] = rng.choice([-inside[key], inside[key] + 1, inside[key] * 1000, inside[key] / 2, 0.5, 5])
        else:
            inside[key] = copy.deepcopy(rng.choice(values))
        if not list_places(x):
            break
    data = write(x).encode("utf-8", "surrogatepass")
    return damage(data, rng) if rng.random() < 0.06 else data


# --- The kinds: folder, rng -> a function that reads what was written there -----------------------


def damage_picture(whole, rng):
    """-> bytes of a picture; a PNG's chunks with right sums, as what a program reads past them"""
    data = whole.pictures[rng.choice(sorted(whole.pictures))]
    if data[1:4] != b"PNG" or rng.random() < 0.4:
        return damage(data, rng)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += size + 12
    i = rng.randrange(len(chunks))
    how = rng.choice(["body", "body", "twice", "drop", "move", "kind", "size"])
    if how == "body":
        chunks[i][1] = damage(chunks[i][1], rng)
    elif how == "twice":
        chunks.insert(rng.randrange(len(chunks)), chunks[i])
    elif how == "drop":
        del chunks[i]
    elif how == "move":
        chunks.insert(rng.randrange(len(chunks)), chunks.pop(i))
    elif how == "kind":
        chunks[i][0] = rng.choice([b"IDAT", b"PLTE", b"tRNS", b"IEND", b"acTL", b"fcTL", b"eXIf", b"iTXt", b"iCCP"])
    else:  # up to 150 megapixels, of one bit or more
        w, h = rng.choice([(0, 1), (1, 1), (13000, 11000), (1, 10**5), (2**31 - 1, 1), (9000, 3)])
        kind = rng.choice([(1, 0), (8, 0), (8, 2), (16, 2), (8, 3), (8, 6), (3, 9)])
        chunks[0][1] = struct.pack(">IIBBBBB", w, h, *kind, 0, 0, 0)
    out = data[:8]
    for kind, body in chunks:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def sample(whole, folder, *argv, weights="sd"):
    """sample.py on what is there -> a function"""
    import sample as program

    usual = ["--weights", getattr(whole, weights), "--steps", 1, "--size", 16, "--device", "cpu", "--precision", "fp32"]
    given = [name for name in argv if str(name).startswith("--")]
    usual = [word for i in range(0, len(usual), 2) if usual[i] not in given for word in usual[i : i + 2]]
    return lambda: program.main([*map(str, usual), *map(str, argv), "--out", str(folder / "out.png")])


def pictures(whole, folder, rng):
    """As the picture, its map, its mask, its edit, or what a collage is made of"""
    path = folder / rng.choice(["a.png", "a.jpg", "a.tif", "a"])
    path.write_bytes(damage_picture(whole, rng))
    photo = whole.folder / "photo.png"
    prompt = ["--prompt", "a red circle"]
    edits = folder / "edits.json"
    edits.write_text(json.dumps({"image": str(rng.choice([path, photo])), "segments": [{"mask": str(path)}]}))
    return sample(whole, folder, *rng.choice([
        ["--image", path, "--strength", 1, *prompt], ["--image", photo, "--change-map", path, *prompt],
        ["--image", photo, "--mask", path, "--paste-back", *prompt], ["--image", path, "--change-map", path, *prompt],
        ["--image", path, "--mask", "alpha", "--softness", 0, *prompt],
        ["--image", photo, "--edit", path, "--weights", whole.mfx],
        ["--collage", edits, "--weights", whole.mfx],
    ]))  # fmt: skip


EDITS = {"image": "photo.png", "segments": [
    {"mask": "black.png", "edits": [{"translate": [20, 3]}, {"scale": 1.3, "about": [20, 20]}, {"rotate": 20}], "z": 1},
    {"polygon": [[1, 1], [40, 2], [30, 30]], "edits": [{"duplicate": True}, {"mirror": "horizontal"}]},
    {"box": [20, 20, 30, 30], "edits": [{"scale": 0.5}, {"duplicate": True}, {"translate": [3, -2.5]}], "z": -2},
    {"click": [24, 24], "edits": [{"delete": True}]}]}  # fmt: skip
NUMBERS = [0, 1e-9, 0.5, 1, 3, 47.999, 48, 1e3, 1e9, 1e30, 1e154, 1e300, -1, -1e9, 5e-324]


def edits(whole, folder, rng):
    made = copy.deepcopy(EDITS)
    made["segments"] = [s for s in made["segments"][1:] if rng.random() < 0.6] or made["segments"][1:2]
    if rng.random() < 0.1:  # very many
        segment = rng.choice(made["segments"])
        segment["edits"] = segment["edits"] * rng.choice([100, 10**4])
        made["segments"] = made["segments"] * rng.choice([1, 100, 10**4] if len(segment["edits"]) < 99 else [1])
        (folder / "edits.json").write_text(json.dumps(made))
    else:
        points = [[rng.choice(NUMBERS), rng.choice(NUMBERS)] for _ in range(20)]
        values = [*VALUES, *NUMBERS, *NUMBERS, *points, "black.png", "edits.json"]
        (folder / "edits.json").write_bytes(damage_json(made, rng, values))
    for name in ("photo.png", "black.png"):
        shutil.copy(whole.folder / name, folder)
    return sample(whole, folder, "--collage", folder / "edits.json", weights="mfx")


def use_weights(whole, folder, kind="sd", path=None):
    """An edit of one step with the weights in the folder"""
    weights = path or folder / kind
    if kind == "mfx":
        edit = whole.folder / "photo.png"
        return sample(whole, folder, "--image", edit, "--edit", edit, "--weights", weights)
    return sample(whole, folder, "--prompt", "a red circle", "--weights", weights)


def change_tensor(tensors, rng, strange=()):
    """{name: tensor}, whole, but for one that is not as it should be, in place"""
    import torch

    name = rng.choice(sorted(tensors))
    x = tensors[name]
    others = [x.long(), x.bool(), x.double(), x.bfloat16(), x.float(), x.to(torch.float8_e4m3fn), x.to(torch.complex64),
              torch.atleast_1d(x)[:0], x[None], x.flatten(), x * torch.nan, x * 1e9, torch.tensor(1.0),
              torch.zeros([1] * 9), x.byte(), x.flatten().reshape(x.shape[::-1])]  # fmt: skip
    how = rng.choice(["value", "value", "value", "drop", "rename", "add"])
    if how == "value":
        tensors[name] = rng.choice(others + [make(x) for make in strange])
    elif how != "add":
        del tensors[name]
    if how in ("rename", "add"):
        names = [name + "x", name.replace(".0.", ".7."), "a" * 10**4, "", "down_blocks.10000000.resnets.0.conv1.weight"]
        tensors[rng.choice([*names, "position_ids", "model_ema.decay", "lora_unet.alpha"])] = x.clone()


def damage_safetensors(data, rng):
    from safetensors.torch import load, save

    if rng.random() < 0.5:
        tensors = load(data)
        change_tensor(tensors, rng)
        return save(tensors)
    if rng.random() < 0.3:
        return damage(data, rng, int.from_bytes(data[:8], "little"))
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    values = [*VALUES, "F64", "I64", "BOOL", "F8_E4M3", "U8", [2**32, 2**32], [-1, 4], [0, 2], [5, 3], [0, 10**9]]
    told = damage_json(header, rng, values)
    if rng.random() < 0.2:
        body = damage(body, rng, len(body))
    return struct.pack("<Q", rng.choice([len(told)] * 99 + EDGES) % 2**64) + told + body


def safetensors(whole, folder, rng):
    kind = rng.choice(["sd", "mfx"])
    shutil.copytree(getattr(whole, kind), folder / kind)
    path = rng.choice(sorted((folder / kind).rglob("*.safetensors")))
    path.write_bytes(damage_safetensors(path.read_bytes(), rng))
    if rng.random() < 0.3:  # then all is read off the shapes
        (path.parent / "config.json").unlink()
    return use_weights(whole, folder, kind)


class Runs:
    """A pickle of this calls something"""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def write_pickle(path, tensors, rng, wrap):
    """{name: tensor} as torch.save writes it, in what `wrap` puts around it: damaged, strange or hostile"""
    import torch

    how = rng.choice(["bytes", "bytes", "bytes", "code", "value", "value"])
    marker = path.parent / "code ran"
    if how == "code":
        evil = [(os.mkdir, str(marker)), (Path.touch, marker), (exec, f"open({str(marker)!r}, 'w')"),
                (eval, f"__import__('os').mkdir({str(marker)!r})"), (os.system, f"mkdir '{marker}'"),
                (bytearray, 10**18), (torch.load, str(path)), (getattr, dict, "keys"), (map, print, [1])]  # fmt: skip
        tensors[rng.choice(sorted(tensors))] = Runs(*rng.choice(evil))
    elif how == "value":
        change_tensor(tensors, rng, [
            lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.flatten()[:1].expand(2**20, 2**9),
            lambda x: {"a": x}, lambda x: [x], lambda x: torch.nn.Parameter(x.float()), lambda x: "text"])  # fmt: skip
    content = wrap(tensors)
    zipped = rng.random() < 0.6
    torch.save(content, path, pickle_protocol=rng.choice([2, 2, 4]), _use_new_zipfile_serialization=zipped)
    if how == "bytes" and zipped and rng.random() < 0.6:  # the archive is whole, and one of its files is not
        with zipfile.ZipFile(path) as archive:
            contents = {entry: archive.read(entry) for entry in archive.namelist()}
        program = next(entry for entry in contents if entry.endswith("data.pkl"))
        entry = program if rng.random() < 0.7 else rng.choice(list(contents))
        contents[entry] = damage(contents[entry], rng, 10**4)
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
            for entry, data in contents.items():
                archive.writestr(entry, data)
    elif how == "bytes":
        path.write_bytes(damage(path.read_bytes(), rng, 10**4))


def pickles(whole, folder, rng):
    path = folder / rng.choice(["a.ckpt", "a.pt", "a.safetensors", "a.bin"])
    write_pickle(path, dict(whole.tensors), rng, lambda x: x if rng.random() < 0.5 else {"state_dict": x, "epoch": 3})
    shutil.copytree(whole.sd / "tokenizer", folder / "tokenizer")
    return use_weights(whole, folder, path=path)


def write_either(path, tensors, rng, wrap=dict):
    """As a pickle, or as safetensors under the same name: what a file is, its content says"""
    from safetensors.torch import save

    if rng.random() < 0.6:
        write_pickle(path, tensors, rng, wrap)
    else:
        path.write_bytes(damage_safetensors(save(tensors), rng))


def words(whole, folder, rng):
    """A learned word, as the original program, A1111, diffusers or kohya write it"""
    import torch

    path = folder / rng.choice(["cat.pt", "cat.bin", "cat.safetensors"])
    width = whole.tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].shape[1]
    tensors = {rng.choice(["<cat>", "*", "emb_params"]): torch.ones(rng.choice([1, 3, 3, 80]), width)}

    def wrap(x):
        about = {"string_to_token": {"*": 265}, "name": rng.choice(["<dog>", "", None, 5, "\0", "日本", "a" * 5000])}
        return rng.choice([x, x, about | {"string_to_param": x}, {"string_to_param": torch.nn.ParameterDict()}])

    write_either(path, tensors, rng, wrap)
    return sample(whole, folder, "--prompt", "a <cat> beside a cat", "--words", path)


def lora(whole, folder, rng):
    """One of a few layers, in any layout"""
    import sd
    from tests import loras

    model = sd.load(whole.sd)
    dora = rng.choice([None, "out", "in"])
    factors = loras.make(model, mid=rng.random() < 0.5, dora=dora, only="mid_block|layers.0")
    write = rng.choice([loras.kohya, loras.original, loras.diffusers])
    path = folder / rng.choice(["style.pt", "style.safetensors"])
    write_either(path, write(factors, model), rng, lambda x: x if rng.random() < 0.8 else {"state_dict": x})
    weight = rng.choice(["", ":0", ":0.5", ":-1", ":100", ":nan", ":", ":1:1"])
    return sample(whole, folder, "--prompt", "a cat", "--lora", f"{path}{weight}")


def networks(whole, folder, rng):
    """A file of RAFT, Segment Anything or MiDaS, or one of the two of LPIPS"""
    import torch

    from checkpoints import published
    from tests.networks import FILES

    kind = rng.choice(["raft", "sam", "sam", "midas", "midas", "lpips", "lpips"])
    names = published.LPIPS if kind == "lpips" else [FILES[kind]]
    for name in names:
        shutil.copy(whole.networks / name, folder)
    path = folder / rng.choice(names)
    tensors = torch.load(path, weights_only=True)
    write_either(path, tensors, rng, lambda x: x if rng.random() < 0.8 else {"state_dict": x})

    def compare():
        x = torch.rand(1, 3, 32, 32)
        published.load_lpips(*(folder / name for name in names))(x, -x)

    def flow():
        published.load("raft", path).flows(torch.rand(2, 3, 16, 16), iterations=1)

    if kind in ("raft", "lpips"):
        return flow if kind == "raft" else compare
    change_map = {"midas": ["depth"], "sam": ["sam:9,9=0", "sam:0,0.5"]}[kind]
    return sample(whole, folder, "--image", whole.folder / "photo.png", "--prompt", "a red circle",
                  "--change-map", rng.choice(change_map), "--networks", folder, "--steps", 3)  # fmt: skip


def configurations(whole, folder, rng):
    """JSON and text beside the weights: of networks, schedules, tokenizers"""
    kind = rng.choice(["sd", "sd", "mfx"])
    shutil.copytree(getattr(whole, kind), folder / kind)
    path = rng.choice(sorted(p for p in (folder / kind).rglob("*.*") if p.suffix in (".json", ".txt")))
    if path.suffix == ".json":
        path.write_bytes(damage_json(json.loads(path.read_text(encoding="utf-8")), rng))
    else:
        path.write_bytes(damage(path.read_bytes(), rng))
    return use_weights(whole, folder, kind)


def videos(whole, folder, rng):
    import cv2
    import numpy as np

    from video.clips import find_clips, read_window

    ending = rng.choice([*sorted(whole.clips), "frames"])
    path = folder / f"clip{ending}"
    if ending == "frames":
        path = folder / "frames"
        path.mkdir()
        for i in range(rng.choice([1, 2, 20])):
            frame = np.asarray(whole.photo.rotate(i))
            data = cv2.imencode(rng.choice([".png", ".jpg"]), frame)[1].tobytes()
            data = damage(data, rng) if rng.random() < 0.3 else data
            (path / f"{rng.choice(['', 'a', '²', '._'])}{i}.{rng.choice(['png', 'jpg'])}").write_bytes(data)
    else:
        data = whole.clips[ending]
        path.write_bytes(damage(data, rng, rng.choice([64, 1024, len(data)])))

    def read():
        for _, clip in find_clips([path]):
            try:
                read_window(clip, 32, 24, np.random.default_rng(0))
            except cv2.error as e:  # data.py takes it for a broken clip
                raise ValueError(str(e).strip().splitlines()[0]) from None

    return read


def shards(whole, folder, rng):
    from torch.utils.data import DataLoader

    from video.batches import ShardPairs

    shutil.copytree(whole.pairs, folder / "pairs")
    path = rng.choice(sorted((folder / "pairs").iterdir()))
    if path.suffix == ".json":
        path.write_bytes(damage_json(json.loads(path.read_text()), rng))
    elif rng.random() < 0.4:
        path.write_bytes(damage(path.read_bytes(), rng, 1024))
    else:
        with tarfile.open(path) as tar:
            members = [[m.name, tar.extractfile(m).read()] for m in tar]
        i = rng.randrange(len(members))
        how = rng.choice(["bytes", "picture", "name", "drop", "twice", "link"])
        if how in ("bytes", "picture"):
            members[i][1] = damage(members[i][1], rng) if how == "bytes" else damage_picture(whole, rng)
        elif how == "name":
            members[i][0] = rng.choice(["x", "", "/a.ref.jpg", "000000", "é.ref.jpg", "../" + members[i][0]])
        elif how == "drop":
            del members[i]
        elif how == "twice":
            members.append(members[i])
        with tarfile.open(path, "w") as tar:
            for k, (name, data) in enumerate(members):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                if how == "link" and k == i:
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
                tar.addfile(member, io.BytesIO(data))

    def read():
        for batch in DataLoader(ShardPairs(folder / "pairs", "both", 4, epochs=1, rank=0, world=1), 4):
            assert batch["coarse"].shape == batch["target"].shape and batch["reference"].abs().max() <= 1

    return read


def states(whole, folder, rng):
    import train
    from common.run_state import list_states, read_recipe
    from tests.training import fit_tiny

    out = folder / "run"
    shutil.copytree(whole.run, out)
    for path in list_states(out, "tiny") if rng.random() < 0.5 else list_states(out, "tiny")[-1:]:
        data = path.read_bytes()
        if rng.random() < 0.5:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            notes = header["__metadata__"]
            name = rng.choice(sorted(notes))
            inner = damage_json([json.loads(notes[name])], rng)
            notes[name] = inner.decode("utf-8", "replace")[1:-1]
            told = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(told)) + told + data[8 + size :])
        else:
            path.write_bytes(damage_safetensors(data, rng))

    def read():
        recipe = read_recipe(out, "tiny", train.Recipe)
        fit_tiny(out, True, replace(recipe, steps=min(recipe.steps, 6)))

    return read


def planted(whole, folder, rng):
    """Not a reader of ours: what must be found, by the number of the case"""
    def leave():
        (folder / ".out.png.123").touch()

    def lines():
        raise ValueError("one\ntwo")

    return rng.choice([lambda: None, lambda: open("/no/such"), lambda: {}["a"], lambda: time.sleep(60), leave, lines,
                       lambda: (folder / "code ran").mkdir(), lambda: os.kill(os.getpid(), 11),
                       lambda: bytearray(13 * 2**28).find(b"x")])  # fmt: skip


READERS = (pictures, edits, safetensors, pickles, configurations, words, lora, networks, videos, shards, states)
KINDS = {kind.__name__: kind for kind in READERS}
