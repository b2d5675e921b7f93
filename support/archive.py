"""Files of tensors: fetched, read as data, checked. Nothing in a file is run, whoever wrote it.

Three formats, told apart by their first bytes: torch.save's, safetensors, and OpenAI's TorchScript archives, which
torch.load refuses to read as data (torch.jit.load would run code from the file).
"""
import hashlib
import io
import json
import os
import pickle
import re
import socket
import zipfile
from contextlib import contextmanager

import numpy as np
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
    if path.exists():
        return
    timeout, failures = socket.getdefaulttimeout(), []
    for url in urls:
        print(f"downloading {url}\n         to {path}", flush=True)
        try:  # writes beside the target, checks the hash, renames: an interrupted download leaves nothing
            socket.setdefaulttimeout(SILENCE)
            path.parent.mkdir(parents=True, exist_ok=True)
            return torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
        except Exception as error:  # no network, 404, a dead connection, other bytes, a full disk
            failures.append(f"{url} said: {first_line(error, 300)}")
        finally:
            socket.setdefaulttimeout(timeout)
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
        if head[:2] == b"PK":
            return flatten(read_archive(path), path)
        if head[:2] == b"\x80\x02":  # torch.save's before PyTorch 1.6: a bare pickle, without checksums
            return flatten(torch.load(path, map_location="cpu", weights_only=True), path)
    raise ArchiveError(f"{path} is no file of torch.save, of safetensors or of TorchScript, it begins with {head!r}. "
                       "If it is a Git LFS pointer, run git lfs pull in its folder")


def check_sha256(path, sha256):
    name = DIGITS.search(path.resolve().name)
    wanted = sha256 or name and (name[1] or name[2]) or ""
    found = file_sha256(path) if wanted and not wanted.isdecimal() else wanted  # eight decimal digits are a date
    if not found.startswith(wanted):
        mend = ("Delete it, then it is fetched again" if sha256 else
                "Delete it and fetch it again. If the digits in its name mean another thing, rename it")
        raise ArchiveError(f"{path} is damaged or another file: its sha256 begins with {found[:8]}, the published "
                           f"one's with {wanted[:8]}. {mend}")


def read_archive(path):
    """A zip of torch.save or TorchScript -> the tensors and plain values in it. Raises ArchiveError."""
    with plain_errors(path), zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > 10 * path.stat().st_size:
            raise ArchiveError(f"{path} unpacks to ten times its size: it was not written by PyTorch")
        if damaged := archive.testzip():  # torch.load itself checks no checksum
            raise ArchiveError(f"{path} is damaged (record {damaged[:60]!r}): fetch it again")
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return read_torchscript(path)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def plain_errors(path):
    """Whatever is raised while a file is read -> ArchiveError of one line."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:  # a damaged or foreign file may raise anything
        reason = first_line(error).partition("Weights only load failed")[0] or "no tensors"  # not torch's advice
        text = f"is truncated, damaged or of no format that is read here ({type(error).__name__}: {reason})"
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):  # so both unpicklers name the class that they refuse
            text = (f"holds more than tensors: it wants the class {wanted[1][:60]}, and nothing in a file is run here. "
                    "If you trust it, torch.load it where it was made, with weights_only=False, and torch.save its "
                    "state dict alone")
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
            raise ArchiveError(f"{path} is damaged: {key[:60]!r} holds values not finite or beyond {LARGEST:g}")


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


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}


def read_safetensors(path):
    """8 bytes with the header's length; the header, JSON {name: {dtype, shape, data_offsets}}; then the tensors' bytes,
    one after the other without a gap. ValueError and others if it is not so."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header would have {length} bytes")
        header, data = json.loads(file.read(length)), memoryview(np.fromfile(file, np.uint8))
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, stop) = entry["shape"], entry["data_offsets"]
        tensors[name] = torch.frombuffer(data[begin:stop], dtype=DTYPES[entry["dtype"]]).reshape(shape)
        if begin != end or list(tensors[name].shape) != shape:  # reshape takes -1
            raise ValueError(f"shape or place of {name[:60]!r}")
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes are no tensor's")
    return tensors


class Scripted:
    """Stands for any module of a TorchScript archive; its attributes arrive through the pickle's BUILD."""


class DataOnly:
    """What torch.load takes in the place of the module pickle."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return Scripted
            if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_torchscript(path):
    """-> the module. torch.load reads it as data once the record that marks TorchScript has another name."""
    content = io.BytesIO(path.read_bytes().replace(b"/constants.pkl", b"/constants.bin"))
    return torch.load(content, "cpu", pickle_module=DataOnly, weights_only=False)
