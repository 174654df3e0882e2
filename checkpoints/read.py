"""Checkpoint files -> {name: tensor}, without running anything that is in them.

What a file is, its first bytes say, and not its ending.
"""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.files import read_json

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
          torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


def read_tensors(path):
    """A safetensors file or a pickled state dict -> {name: tensor}, on the CPU, memory-mapped.

    FileNotFoundError if there is no file, ValueError if it is empty, damaged, refused or no
    checkpoint.
    """
    content = read_content(path)
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and torch.is_tensor(value):
            tensors[name] = value
    if not tensors:
        raise ValueError(f"{path} is not a checkpoint: there are no tensors in it")
    return tensors


def read_content(path):
    """The same, but of a pickle whatever dict was saved, whose values may be dicts of tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    if start[8:9] == b"{":
        return read_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return read_pickle(path)
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", start, re.IGNORECASE):
        raise ValueError(f"{path} is not a checkpoint but a web page that was saved under this "
                         "name: download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is not a checkpoint but Git LFS's pointer to it: run git lfs pull")
    raise ValueError(f"{path} is damaged, or not a checkpoint: it begins neither as safetensors nor "
                     "as PyTorch's files (.ckpt, .pt, .pth, .bin) do")


MOST_TENSORS = 2**16  # Stable Diffusion XL has 2,500


def read_safetensors(path):
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if 2**26 < header < path.stat().st_size:
        raise ValueError(f"{path} is not a checkpoint: its table of contents takes {header} bytes")
    try:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            if len(names) > MOST_TENSORS:
                raise ValueError(f"{path} is not a checkpoint: it has {len(names)} tensors")
            for name in names:
                check_shape(path, name, f.get_slice(name).get_shape())
            return {name: f.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, AttributeError, RuntimeError) as e:
        reason = f"{path} is not a whole safetensors file ({first_line(e)}): download it again"
        raise ValueError(reason) from None


def check_shape(path, name, shape):
    if len(shape) > 8 or max(shape, default=0) >= 2**31:
        raise ValueError(f"{path} is damaged: no network has a tensor of the shape that {name:.80} "
                         "has there")


def first_line(error):
    return f"{error}\n{type(error).__name__}".strip().splitlines()[0]


# --------------------------------------------------------------------------------------------------
# Pickles
#
# A pickle is a program for a small machine that can look up any function by its name and call it.
# Here the machine finds nothing: every name becomes a class of its own, `Inert`, which remembers
# what it was called with. Then `restore` makes tensors of what stands for PyTorch's ways to build
# one. Names of known training frameworks may be there as well; all others are refused.

BYSTANDERS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|collections|typing)\..+"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|_codecs\.encode"
    r"|torch\.(storage\.)?\w*Storage|torch\.(Size|Tensor|device|per_\w+|\w*\d\w*|bool|strided)"
    r"|torch\.nn\.(parameter\.Parameter(Dict)?|modules\.container\.ParameterDict)"
    r"|torch\.serialization\._get_layout|(builtins|__builtin__)\.(set|bytearray|complex)"
)
STORAGES = {  # what is in a storage of these classes
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}


class Inert(dict):
    """Stands for what has a name in a pickle. It takes anything, remembers it and does nothing."""

    name = ""  # e.g. torch._utils._rebuild_tensor_v2
    args = ()
    state = None

    def __init__(self, *args):
        super().__init__()
        self.args = args

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle._Unpickler):  # the one in Python: that in C makes room for what a file claims
    def __init__(self, file):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.found = {}  # name: its class
        self.storages = {}  # key: dtype

    def find_class(self, module, name):
        name = f"{module}.{name}"
        return self.found.setdefault(name, type("Inert", (Inert,), {"name": name}))

    def persistent_load(self, saved):
        """("storage", class, key, device, length) -> the same"""
        self.storages[saved[2]] = STORAGES[saved[1].name.split(".")[-1]]
        return saved


def read_pickle(path):
    """What `torch.save` wrote -> the dict that was saved."""
    names = []
    try:
        with open(path, "rb") as file:
            load = load_zip if zipfile.is_zipfile(path) else load_legacy
            content, records = load(file, names)
        refused = [name for name in names if not BYSTANDERS.fullmatch(name)]
        if not refused and isinstance(content, dict):
            # Storages are pieces of the file, mapped into memory.
            whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
            content = Restorer(whole, records).restore(content, depth=2)
            if isinstance(content, dict):
                return content
    except Exception as e:  # a damaged file can fail in any way
        refused = [name for name in names if not BYSTANDERS.fullmatch(name)]
        if not refused:
            why = first_line(e) if isinstance(e, ValueError) else type(e).__name__
            raise ValueError(f"{path} is damaged, or not a checkpoint ({why:.200}): download it "
                             "again") from None
    if refused:
        listed = " ".join(", ".join(refused[:3]).split())
        raise ValueError(f"{path} is refused: a pickle that refers to {listed:.200} could run code. "
                         "Get the .safetensors version, or convert it on a machine where you trust "
                         "it")
    raise ValueError(f"{path} is not a checkpoint: there are no tensors in it")


def run(file, names):
    """One pickle from a file -> its object, {key: dtype} of the storages; `names` gets its names"""
    machine = Unpickler(file)
    try:
        return machine.load(), machine.storages
    finally:
        names += machine.found


def load_zip(file, names):
    """torch.save's format since 2020 -> the object, {key: (first byte, bytes)} of the storages"""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type for entry in entries.values()):
            raise ValueError("it is a compressed archive, which torch.save does not make")
        root = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl")
        if entries.get(f"{root}byteorder") and archive.read(f"{root}byteorder") == b"big":
            raise ValueError("it was written on a computer that puts the high byte first")
        with archive.open(f"{root}data.pkl") as pickled:
            content, _ = run(pickled, names)

    # What is in an entry begins behind its name and its padding, whose lengths are just before.
    records = {}
    for name, entry in entries.items():
        if name.startswith(f"{root}data/"):
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
            padding = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            begin = entry.header_offset + 30 + padding
            records[name.removeprefix(f"{root}data/")] = begin, entry.file_size
    return content, records


def load_legacy(file, names):
    """The format before that: a magic number, its version, sizes of types, the object, keys, and
    then each storage, its length before it. Results as `load_zip`."""
    magic, _ = run(file, names)
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is not of torch.save")
    run(file, names)
    run(file, names)
    content, dtypes = run(file, names)
    keys, _ = run(file, names)
    records = {}
    for key in keys:
        size = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        records[key] = file.tell(), size
        file.seek(size, 1)
    return content, records


class Restorer:
    """Makes tensors of what stands for them. ValueError where they are not within the file."""

    def __init__(self, whole, records):
        self.whole = whole  # the file
        self.records = records  # key: (first byte, bytes) of each storage
        self.storages = {}  # key: the storage; a copy if no number may begin at its place

    def restore(self, x, depth):
        """x -> the tensor that it stands for; a dict, its values restored; or x"""
        if isinstance(x, Inert) and "_rebuild" in x.name:
            return self.build(x.name.split(".")[-1], x.args)
        if not (isinstance(x, dict) and depth):
            return x
        if isinstance(x, Inert) and isinstance(x.state, dict) and "_parameters" in x.state:
            x = x.state["_parameters"]  # a ParameterDict
        elif isinstance(x, Inert) and x.args:
            x = dict(x.args[0])  # an OrderedDict as Python 2 saved it
        return {key: self.restore(value, depth - 1) for key, value in x.items()}

    def build(self, how, args):
        if how == "_rebuild_from_type_v2":
            return self.restore(args[0](*args[2]), 0)
        if how in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return self.restore(args[0], 0)
        if how not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            raise ValueError(f"a tensor is stored by {how}; only plain, dense ones are read")
        (_, kind, key, _, _, *view), offset, shape, stride = args[:4]
        dtype = STORAGES[kind.name.split(".")[-1]]
        if how == "_rebuild_tensor_v3":
            dtype = getattr(torch, args[6].name.removeprefix("torch."))
        if view and view[0]:
            offset += view[0][1]  # files of 2016: a storage that is a part of another

        # All of it must be within its storage, and its storage within the file.
        begin, size = self.records[key]
        shape, stride = tuple(shape), tuple(stride)
        check_shape("it", key, shape)
        if min(offset, *shape, *stride, 0) < 0 or len(shape) != len(stride):
            raise ValueError(f"a tensor has the shape {shape} and the strides {stride}")
        numel = torch.Size(shape).numel()
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride)) if numel else -1
        if (last + 1) * dtype.itemsize > size or begin + size > len(self.whole):
            raise ValueError("a tensor is longer than what is stored of it")
        if not numel:
            return torch.empty(shape, dtype=dtype)
        if key not in self.storages:
            storage = self.whole[begin : begin + size]
            self.storages[key] = storage.clone() if begin % dtype.itemsize else storage
        return torch.empty(0, dtype=dtype).set_(self.storages[key], offset, shape, stride)


# --------------------------------------------------------------------------------------------------
# Folders, and whether tensors fit


def read_folder(folder):
    """The weights in one part's folder, whole or in shards, fp32 or fp16 -> {name: tensor}."""
    folder = Path(folder)
    for kind in ("safetensors", "bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for variant in ("", ".fp16"):
                file = folder / f"{stem}{variant}.{kind}"
                if file.is_file():
                    return read_tensors(file)
                for index in (f"{stem}.{kind}.index{variant}.json",
                              f"{stem}{variant}.{kind}.index.json"):
                    if (folder / index).is_file():
                        return read_shards(folder / index)
    raise FileNotFoundError(f"there are no weights in {folder}: expected "
                            "diffusion_pytorch_model.safetensors, model.safetensors, or the same "
                            "as .bin")


def read_shards(index):
    """The index of files that share the tensors of one network -> {name: tensor}."""
    files = read_json(index).get("weight_map")
    if not (isinstance(files, dict) and all(isinstance(file, str) for file in files.values())):
        raise ValueError(f"{index} does not say where each tensor is: copy it again")
    tensors = {}
    for file in sorted(set(files.values())):
        tensors |= read_tensors(index.parent / file)
    return tensors


def copy_tensors(where, tensors, device, dtypes):
    """{name: tensor} in these precisions, {name: dtype}, on that device. A tensor is itself where
    nothing changes, so that it stays in the file.

    ValueError if they would take much more memory than is stored of them, as in no real file.
    """
    there = {}
    invented = 0  # bytes
    for name, tensor in tensors.items():
        if tensor.dtype != dtypes[name] or torch.device(device).type != "cpu":
            invented += max(0, tensor.nbytes - tensor.untyped_storage().nbytes())
        if invented > 2**28:
            raise ValueError(f"{where} is damaged: {name} is larger than what is stored of it")
        there[name] = tensor.to(device, dtypes[name])
    return there


def describe_misfits(model, tensors):
    """What keeps {name: tensor} from being the model's, in words; "" if nothing."""
    expected = model.state_dict()
    misfits = {"missing": [name for name in expected if name not in tensors],
               "unexpected": [name for name in tensors if name not in expected],
               "misshapen": [], "other than floating-point": []}
    for name, wanted in expected.items():
        stored = tensors.get(name, wanted)
        if stored.shape != wanted.shape:
            shapes = f"{tuple(stored.shape)} instead of {tuple(wanted.shape)}"
            misfits["misshapen"].append(f"{name} {shapes}")
        elif stored.dtype not in (FLOATS if wanted.is_floating_point() else {wanted.dtype}):
            misfits["other than floating-point"].append(f"{name} {stored.dtype}")
    problems = []
    for kind, names in misfits.items():
        if names:
            problems.append(f"{len(names)} {kind} tensors, e.g. {', '.join(names[:3])}")
    return "; ".join(problems)
