"""Files of tensors read as data: nothing in them is run, whoever wrote them."""
import zipfile

import torch

from support import UserError


class ArchiveError(UserError):
    """A file that is damaged, or claims more than it holds."""


def read_archive(path):
    """What torch.save wrote -> what it holds: tensors and plain values, nothing else.

    Raises ArchiveError if the archive is damaged, and any error at all if the file is no archive."""
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > 10 * path.stat().st_size:
            raise ArchiveError(f"{path} unpacks to ten times its size: it was not written by torch.save, "
                               "which does not compress")
        if damaged := archive.testzip():  # torch.load itself checks no checksum
            raise ArchiveError(f"{path} is damaged (record {damaged}): fetch it again")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_tensors(state, path):
    """Raises ArchiveError unless `state` maps names to dense finite tensors that fit into the file."""
    if not all(type(key) is str and type(x) is torch.Tensor and x.layout is torch.strided and x.device.type == "cpu"
               for key, x in state.items()):
        raise ArchiveError(f"{path} holds no state dict (a mapping of names to tensors)")
    if sum(x.numel() * x.element_size() for x in state.values()) > 2 * path.stat().st_size:
        raise ArchiveError(f"{path} names larger tensors than it holds: it is damaged or hostile")
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArchiveError(f"{path}: {key} holds values that are not finite: the file is damaged")


def misfit(state, wanted):
    """What of a state dict does not fit the wanted one, in words; None if names and shapes are the same."""
    if differ := sorted(wanted.keys() ^ state.keys()):
        what = "missing" if differ[0] in wanted else "unexpected"
        return f"{len(differ)} tensors differ, the first, {differ[0]}, is {what}"
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            return f"{key} has shape {tuple(tensor.shape)}, expected {tuple(wanted[key].shape)}"
