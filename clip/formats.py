"""The bytes of a CLIP file -> its tensors by name; nothing in the file is run.

Three formats, told apart by their first bytes: torch.save's archives, safetensors, and OpenAI's TorchScript archives,
which torch.load refuses to read as data (torch.jit.load would run code from the file).
"""
import io
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict

import torch

from clip.model import CLIPError
from support import first_line
from support.archive import read_archive


def read_tensors(path):
    """File -> {name: tensor}; nested dicts give dotted names, "state_dict.module.visual.proj". Raises anything."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head[8:9] == b"{":
        return read_safetensors(path)
    if head == b"version https://":
        raise CLIPError("a Git LFS pointer, not the weights themselves: run git lfs pull in its folder")
    if head[:2] != b"PK":
        raise CLIPError("no file of torch.save (PyTorch 1.6 or later), of safetensors or of TorchScript")
    with zipfile.ZipFile(path) as archive:
        scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        return flatten(read_torchscript(archive, path.stat().st_size) if scripted else read_archive(path))


def why(error, path):
    """What was raised while a file was read -> what to tell the user."""
    if isinstance(error, CLIPError):
        return str(error)
    if isinstance(error, zipfile.BadZipFile):
        return "truncated or damaged: fetch it again"
    if isinstance(error, KeyError):
        return f"not a complete CLIP (image and text tower): it lacks the tensor {error}"
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):  # so both unpicklers name the class that they refuse
        return (f"holds more than tensors: it wants the class {wanted[1]}, and nothing in a file is run here. If you "
                f'trust it, load it where it was made, torch.load("{path.name}", weights_only=False), and save the '
                'tensors alone: torch.save(model.state_dict(), "weights.pt")')
    return f"cannot be read as CLIP weights ({type(error).__name__}: {first_line(error, 120)})"


def flatten(content):
    """What an archive holds -> {dotted name: tensor}; what is no tensor is left out."""
    found, rest, seen = {}, [("", content)], set()
    while rest:
        prefix, part = rest.pop()
        part = vars(part) if isinstance(part, Scripted) else part
        if isinstance(part, torch.Tensor):
            found[prefix[:-1]] = part.detach()
        elif isinstance(part, dict) and id(part) not in seen and len(prefix) < 200:
            seen.add(id(part))  # a hostile file may hold a dict that holds itself
            rest += [(f"{prefix}{key}.", value) for key, value in part.items()]
    return found


# ---------------------------------------------------------------- safetensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
LONGEST_HEADER = 10_000_000  # bytes; a CLIP's has about 100,000


def read_safetensors(path):
    """8 bytes with the header's length; the header, JSON {name: {dtype, shape, data_offsets}}; then the tensors' bytes,
    one after the other without a gap. Nothing is believed before it is checked against the file's size."""
    def check(right, what):
        if not right:
            raise CLIPError(f"damaged, {what}: fetch it again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # of the tensors' bytes
        check(start <= min(size, LONGEST_HEADER), f"its header would have {start - 8} bytes")
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            entries = sorted((*entry["data_offsets"], name, entry["dtype"], entry["shape"])
                             for name, entry in header.items())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            entries = None
        check(entries and all(len(entry) == 5 for entry in entries), "its header cannot be read")
        end, tensors = 0, {}
        for begin, stop, name, dtype, shape in entries:
            if dtype not in list(DTYPES):
                raise CLIPError(f"{name[:60]} has dtype {str(dtype)[:20]}, expected {', '.join(DTYPES)}: save as F32")
            check(type(begin) is type(stop) is int and begin == end and type(shape) is list and len(shape) < 9
                  and all(type(n) is int and n > 0 for n in shape)
                  and stop - begin == math.prod(shape) * DTYPES[dtype].itemsize, f"shape or place of {name[:60]!r}")
            end = stop
        check(start + end == size, f"it has {size} bytes, by its header {start + end}")
        data = bytearray(file.read())
    for begin, _, name, dtype, shape in entries:
        flat = torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape), offset=begin)
        tensors[name] = flat.reshape(shape)
    return tensors


# ---------------------------------------------------------------- TorchScript

KNOWN = {  # all that an archive may name beside its own modules; a storage is only its dtype, see persistent_load
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "HalfStorage"): torch.float16, ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64, ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32, ("torch", "BoolStorage"): torch.bool}


class Scripted:
    """Stands for any module of a TorchScript archive; its attributes arrive through the pickle's BUILD."""


class TorchScript(pickle.Unpickler):
    def __init__(self, archive, root):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))  # read to its end, where the checksum is checked
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return Scripted
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return KNOWN[module, name]

    def persistent_load(self, saved_id):
        _, dtype, key, _, _ = saved_id
        if key not in self.storages:  # read once, however often it is named
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=self.storages[key], dtype=dtype, _internal=True)


def read_torchscript(archive, size):
    """-> the module; its attributes are tensors and modules, named as in a state dict"""
    if sum(record.file_size for record in archive.infolist()) > 10 * size:
        raise CLIPError("unpacks to ten times its size: it was not written by PyTorch")
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
    return TorchScript(archive, root).load()
