"""Reads the masks of SBD, MATLAB files of level 5: a struct GTcls whose field Segmentation is uint8 (H, W).

Sizes in a file are checked against its length before anything is made of them. Format: "MAT-File Format", MathWorks.
"""
import struct
import zlib

import numpy as np

from sources.files import DataError

LIMIT = 1 << 24  # bytes of an unpacked variable, more are not unpacked; a VOC mask has about 200,000
UINT8, MATRIX, COMPRESSED = 2, 14, 15  # types of elements
STRUCT, UINT8_ARRAY = 2, 9  # classes of arrays


def read_segmentation(data, name):
    """Bytes of a .mat file -> GTcls.Segmentation, uint8 array (H, W). Raises DataError."""
    try:
        if data[124:128] != b"\0\1IM":  # version 1, numbers of little-endian order
            raise ValueError(f"it starts with {data[:20]!r}")
        for kind, body in elements(data, 128):
            if kind == COMPRESSED:
                (kind, body), = elements(zlib.decompressobj().decompress(body, LIMIT))
            if kind == MATRIX:
                array_class, _, variable, rest = array(body)
                if variable == b"GTcls" and array_class == STRUCT:
                    return segmentation(rest)
        raise ValueError("no struct GTcls")
    except (ValueError, KeyError, StopIteration, struct.error, zlib.error) as error:
        raise DataError(f"cannot read the mask {name} ({error}): expected SBD's file of MATLAB 5 with the uint8 "
                        "matrix GTcls.Segmentation; get SBD anew") from None


def elements(data, at=0):
    """Yields (type, body) of one element after the other."""
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start = at + 8
        if kind >> 16:  # the small form: size, type and at most 4 bytes of body in 8 bytes
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data) or start == at + 4 and size > 4:
            raise ValueError("an element is longer than the file")
        yield kind, data[start:start + size]
        at = at + 8 if start == at + 4 else start + size + (-size % 8 if kind != COMPRESSED else 0)


def array(body):
    """Body of a MATRIX -> its class, dimensions, name and the elements that follow."""
    rest = elements(body)
    flags, dimensions, name = (next(rest, (0, b""))[1] for _ in range(3))
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    return struct.unpack_from("<I", flags)[0] & 0xFF, shape, name, rest


def segmentation(rest):
    """Elements of the struct, length of a field's name, all names, the fields' arrays -> the field Segmentation."""
    (_, width), (_, names) = next(rest), next(rest)
    width, = struct.unpack("<i", width)
    if width < 1:
        raise ValueError("a struct without names")
    fields = [names[i:i + width].split(b"\0")[0] for i in range(0, len(names), width)]
    array_class, shape, _, parts = array(dict(zip(fields, (body for _, body in rest)))[b"Segmentation"])
    kind, values = next(parts)
    if (array_class, kind, len(shape)) != (UINT8_ARRAY, UINT8, 2) or min(shape) < 1:
        raise ValueError(f"Segmentation is no uint8 array of the size {shape}")
    return np.frombuffer(values, np.uint8).reshape(shape, order="F").copy()
