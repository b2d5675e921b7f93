"""Reads the masks of SBD, MATLAB files of level 5: a struct GTcls whose field Segmentation is uint8 (H, W).

Format: "MAT-File Format", MathWorks.
"""
import struct
import zlib

import numpy as np

from sources.files import DataError

LIMIT = 1 << 24  # bytes of an unpacked variable, more are not unpacked; a VOC mask has about 200,000
UINT8, MATRIX, COMPRESSED = 2, 14, 15  # types of elements


def read_segmentation(data, name):
    """Bytes of a .mat file -> GTcls.Segmentation, uint8 array (H, W). Raises DataError."""
    try:
        if data[124:128] != b"\0\1IM":  # version 1, numbers of little-endian order
            raise ValueError(f"it starts with {data[:20]!r}")
        for kind, body in elements(data, 128):
            if kind == COMPRESSED:
                (kind, body), = elements(zlib.decompressobj().decompress(body, LIMIT))
            if kind == MATRIX:
                _, variable, rest = array(body)
                if variable == b"GTcls":
                    return segmentation(rest)
        raise ValueError("no struct GTcls")
    except (ValueError, KeyError, StopIteration, struct.error, zlib.error) as error:
        raise DataError(f"cannot read the mask {name} ({error}): expected SBD's file of MATLAB 5 with the uint8 "
                        "matrix GTcls.Segmentation; get SBD anew") from None


def elements(data, at=0):
    """Yields (type, body) of one element after the other; the body of the last one is cut where the data end."""
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # the small form: size, type and at most 4 bytes of body in 8 bytes
            yield kind & 0xFFFF, data[at + 4:at + 4 + (kind >> 16)]
            at += 8
        else:
            yield kind, data[at + 8:at + 8 + size]
            at += 8 + size + (-size % 8 if kind != COMPRESSED else 0)


def array(body):
    """Body of a MATRIX -> its dimensions, its name and the elements that follow."""
    rest = elements(body)
    _, (_, dimensions), (_, name) = next(rest), next(rest), next(rest)
    return struct.unpack(f"<{len(dimensions) // 4}i", dimensions), name, rest


def segmentation(rest):
    """Elements of the struct, length of a field's name, all names, the fields' arrays -> the field Segmentation."""
    (_, width), (_, names) = next(rest), next(rest)
    width, = struct.unpack("<i", width)
    fields = [names[i:i + width].split(b"\0")[0] for i in range(0, len(names), width)]
    shape, _, parts = array(dict(zip(fields, (body for _, body in rest)))[b"Segmentation"])
    kind, values = next(parts)
    if kind != UINT8 or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"Segmentation is no uint8 array of the size {shape}")
    return np.frombuffer(values, np.uint8).reshape(shape, order="F").copy()
