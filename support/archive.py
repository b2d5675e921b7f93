"""Files of tensors read as data: nothing in them is run, whoever wrote them. Raises ArchiveError.

Checkpoints and CLIP files come as torch.save's archives, OpenAI's CLIP also as TorchScript, which torch.load refuses to
read as data (`torch.jit.load` is deprecated and runs code from the file); its reader here knows the names in KNOWN.
"""
import pickle
import zipfile
from collections import OrderedDict

import torch


class ArchiveError(ValueError):
    """A file that is damaged, or claims more than it holds."""


def read_archive(path):
    """What torch.save or torch.jit.save wrote -> what it holds; of a TorchScript module, its {name: tensor}.

    Raises ArchiveError where the archive is damaged, anything where it is none."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sum(record.file_size for record in archive.infolist()) > 10 * path.stat().st_size:
            raise ArchiveError(f"{path} unpacks to ten times its size: not a file of torch")  # which packs no tensors
        if damaged := archive.testzip():
            raise ArchiveError(f"{path} is damaged (record {damaged}): fetch it again")
        if any(name.endswith("/constants.pkl") for name in names):
            root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("/data.pkl")
            return dict(tensors(TorchScript(archive, root).load()))
    return torch.load(path, map_location="cpu", weights_only=True)


def check_tensors(state, path):
    """Raises ArchiveError unless `state` maps names to dense finite tensors that claim no more than the file holds."""
    if not all(type(key) is str and type(x) is torch.Tensor and x.layout is torch.strided and x.device.type == "cpu"
               for key, x in state.items()):
        raise ArchiveError(f"{path} holds no state dict (a mapping of names to tensors)")
    if sum(x.numel() * x.element_size() for x in state.values()) > 2 * path.stat().st_size:
        raise ArchiveError(f"{path} names larger tensors than it holds: it is damaged or hostile")
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArchiveError(f"{path}: {key} holds values that are not finite: the file is damaged")


def misfit(state, wanted):
    """What of a state dict does not fit the wanted one, in words; None where names and shapes are the same."""
    if differ := sorted(wanted.keys() ^ state.keys()):
        what = "missing" if differ[0] in wanted else "unexpected"
        return f"{len(differ)} tensors differ, the first, {differ[0]}, is {what}"
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            return f"{key} has shape {tuple(tensor.shape)}, expected {tuple(wanted[key].shape)}"


# ---------------------------------------------------------------- TorchScript


class Scripted:
    """Stands for any module of a TorchScript archive; its attributes arrive through the pickle's BUILD."""


KNOWN = {  # all that an archive may name beside its own modules; a storage is only its dtype, see persistent_load
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "HalfStorage"): torch.float16, ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64, ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32, ("torch", "BoolStorage"): torch.bool}


class TorchScript(pickle.Unpickler):
    def __init__(self, archive, root):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return Scripted
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"unexpected {module}.{name}")
        return KNOWN[module, name]

    def persistent_load(self, saved_id):
        _, dtype, key, _, _ = saved_id
        if key not in self.storages:  # read once, however often it is named
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=self.storages[key], dtype=dtype, _internal=True)


def tensors(module, prefix=""):
    """Scripted module -> (name, tensor) of it and of all in it, named as in a state dict."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, Scripted):
            yield from tensors(value, f"{prefix}{name}.")
