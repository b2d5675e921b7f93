"""Files of tensors: fetched, read as data, checked. Nothing in a file is run, whoever wrote it.

Three formats, told apart by their first bytes: torch.save's, safetensors, and OpenAI's TorchScript archives, which
torch.load refuses to read as data (torch.jit.load would run code from the file).
"""
import hashlib
import io
import json
import math
import os
import pickle
import re
import socket
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import torch

from support import UserError, first_line

LARGEST = 1e18  # no weight is; one flipped bit of an exponent makes such a number
SILENCE = 60  # seconds without a byte after which an address counts as dead
DIGITS = re.compile(r"-([0-9a-f]{8})\.pth$|^([0-9a-f]{64})$")  # of its sha256: torch.hub's names, Hugging Face's cache


class ArchiveError(UserError):
    """A file of tensors that is absent, damaged, not what it is called, or claims more than it holds."""


def fetch(path, urls, sha256):
    """Downloads a published file to `path` if there is none, from the first of `urls` that has the right bytes.

    sha256: its digits, or the first ones. Raises ArchiveError."""
    failures = []
    for url in () if path.exists() else urls:
        timeout = socket.getdefaulttimeout()
        print(f"downloading {url}\n         to {path}", flush=True)
        try:  # writes beside the target, checks the hash, renames: an interrupted download leaves nothing
            socket.setdefaulttimeout(SILENCE)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
            break
        except Exception as error:  # no network, 404, a dead connection, other bytes, a full disk
            failures.append(f"{url} said: {first_line(error, 300)}")
            print(f"failed: {error}", flush=True)
        finally:
            socket.setdefaulttimeout(timeout)
    if not path.exists():
        raise ArchiveError(f"could not download {path.name}: {'; '.join(failures)}. Fetch it (sha256 {sha256}) "
                           f"elsewhere and put it at {path}")


def read_tensors(path, sha256=None):
    """File -> {name: tensor}; nested dicts and lists give dotted names, "state_dict.module.visual.proj".

    sha256: the published one; by default, what the file's name says of it, if anything. Raises ArchiveError."""
    if not os.path.isfile(path):
        raise ArchiveError(f"no file {str(path)[:200]}")
    with plain_errors(path):
        check_sha256(path, sha256)
        with open(path, "rb") as file:
            head = file.read(16)
        if head[8:9] == b"{":
            return read_safetensors(path)
        if head == b"version https://":
            raise ArchiveError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull in its folder")
        if head[:2] == b"\x80\x02":  # torch.save's before PyTorch 1.6: a bare pickle, without checksums
            return flatten(torch.load(path, map_location="cpu", weights_only=True), path)
        if head[:2] != b"PK":
            raise ArchiveError(f"{path} is no file of torch.save, of safetensors or of TorchScript")
        with zipfile.ZipFile(path) as archive:
            ends = {name.rpartition("/")[2] for name in archive.namelist()}
            if "data.pkl" not in ends:
                raise ArchiveError(f"{path} is a zip of other things: unpack it, or save the weights by torch.save")
            scripted = "constants.pkl" in ends
            return flatten(read_torchscript(archive, path) if scripted else read_archive(path), path)


def check_sha256(path, sha256):
    name = DIGITS.search(path.resolve().name)
    wanted = sha256 or name and (name[1] or name[2]) or ""
    found = file_sha256(path) if wanted and not wanted.isdecimal() else wanted  # eight decimal digits are a date
    if not found.startswith(wanted):
        rename = "" if sha256 else ". If the digits in its name mean another thing, rename it"
        raise ArchiveError(f"{path} is damaged or another file: its sha256 begins with {found[:8]}, the published "
                           f"one's with {wanted[:8]}. Delete it, then it is fetched again{rename}")


def read_archive(path):
    """What torch.save wrote -> what it holds: tensors and plain values, nothing else. Raises ArchiveError."""
    with plain_errors(path), zipfile.ZipFile(path) as archive:
        check_size(archive, path)
        if damaged := archive.testzip():  # torch.load itself checks no checksum
            raise ArchiveError(f"{path} is damaged (record {damaged[:60]!r}): fetch it again")
        return torch.load(path, map_location="cpu", weights_only=True)


def check_size(archive, path):
    if sum(record.file_size for record in archive.infolist()) > 10 * path.stat().st_size:
        raise ArchiveError(f"{path} unpacks to ten times its size: it was not written by PyTorch")


@contextmanager
def plain_errors(path):
    """Whatever is raised while a file is read -> ArchiveError of one line."""
    try:
        yield
    except ArchiveError:
        raise
    except (zipfile.BadZipFile, EOFError):
        raise ArchiveError(f"{path} is truncated or damaged: fetch it again") from None
    except Exception as error:  # a damaged or foreign file may raise anything
        reason = first_line(error).partition("Weights only load failed")[0] or "no tensors"  # not torch's advice
        text = f"is damaged or cannot be read as tensors ({type(error).__name__}: {reason})"
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):  # so both unpicklers name the class that they refuse
            text = (f"holds more than tensors: it wants the class {wanted[1][:60]}, and nothing in a file is run here. "
                    f'If you trust it, load it where it was made, torch.load("{path.name}", weights_only=False), and '
                    'save the tensors alone: torch.save(model.state_dict(), "weights.pt")')
        raise ArchiveError(f"{path} {text}") from None


def flatten(content, path):
    """What a file holds -> {dotted name: tensor}; what is no tensor is left out."""
    found, rest, seen = {}, [("", content)], set()
    while rest:
        prefix, part = rest.pop()
        part = vars(part) if isinstance(part, Scripted) else part
        if isinstance(part, torch.Tensor):
            if prefix[:-1] in found:
                raise ArchiveError(f"{path} holds two tensors called {prefix[:60]!r}: save one of them alone")
            found[prefix[:-1]] = part.detach()
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))  # a hostile file may hold a dict that holds itself
            if len(prefix) > 1000:
                raise ArchiveError(f"{path} is damaged or hostile: a name of {len(prefix)} characters")
            items = part.items() if isinstance(part, dict) else enumerate(part)
            rest += [(f"{prefix}{key}.", value) for key, value in items]
    return found


def check_tensors(state, path):
    """Raises ArchiveError unless `state` maps names to dense finite tensors that fit into the file."""
    if not all(type(key) is str and type(x) is torch.Tensor and x.layout is torch.strided and x.device.type == "cpu"
               and not x.is_quantized and not x.is_complex() for key, x in state.items()):
        raise ArchiveError(f"{path} holds no state dict (a mapping of names to plain tensors)")
    if sum(x.numel() * x.element_size() for x in state.values()) > 2 * path.stat().st_size:
        raise ArchiveError(f"{path} names larger tensors than it holds: it is damaged or hostile")
    for key, tensor in state.items():
        if not (tensor.float().abs() < LARGEST).all():  # nan is not
            raise ArchiveError(f"{path}: {key[:60]!r} holds values that are not finite or beyond {LARGEST:g}: the file "
                               "is damaged")


def misfit(state, wanted):
    """What of a state dict does not fit the wanted one, in words; None if names, shapes and kinds are the same.

    BatchNorm's counters may be absent: it does not need them, and old files have none."""
    differ = sorted(key for key in wanted.keys() ^ state.keys() if not key.endswith("num_batches_tracked"))
    if differ:
        what = "missing" if differ[0] in wanted else "unexpected"
        return f"{len(differ)} tensors differ, the first, {differ[0][:60]!r}, is {what}"
    for key in wanted.keys() & state.keys():
        if state[key].shape != wanted[key].shape:
            return f"{key!r} has shape {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        if wanted[key].is_floating_point() and not state[key].is_floating_point():
            return f"{key!r} is {state[key].dtype}, expected floats: if it is quantised, save it as fp32 or fp16"


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
LONGEST_HEADER = 10_000_000  # bytes; a CLIP's has about 100,000


def read_safetensors(path):
    """8 bytes with the header's length; the header, JSON {name: {dtype, shape, data_offsets}}; then the tensors' bytes,
    one after the other without a gap. Nothing is believed before it is checked against the file's size."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size, LONGEST_HEADER):
            raise ArchiveError(f"{path} is damaged, its header would have {length} bytes: fetch it again")
        header, data = json.loads(file.read(length)), memoryview(bytearray(path.stat().st_size - 8 - length))
        file.readinto(data)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in DTYPES:
            raise ArchiveError(f"{path}: {name[:60]!r} has dtype {str(dtype)[:20]!r}, expected one of "
                               f"{', '.join(DTYPES)}: save it as F32")
        fits = len(shape) < 9 and all(type(n) is int and n > 0 for n in shape) and begin == end and (
            stop - begin == math.prod(shape) * DTYPES[dtype].itemsize)
        if not fits or stop > len(data):
            raise ArchiveError(f"{path} is damaged, shape or place of {name[:60]!r}: fetch it again")
        tensors[name] = torch.frombuffer(data[begin:stop], dtype=DTYPES[dtype]).reshape(shape)
        end = stop
    if end != len(data):
        raise ArchiveError(f"{path} is damaged, {len(data) - end} bytes are no tensor's: fetch it again")
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


def read_torchscript(archive, path):
    """-> the module; its attributes are tensors and modules, named as in a state dict"""
    check_size(archive, path)
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
    return TorchScript(archive, root).load()
