"""Fetches archives and unpacks them, whole or not at all.

An archive arrives as NAME.partial in the data set's folder; an interrupted transfer goes on from there. It gets its
name once its checksum matches, whatever the server, and is deleted once it is unpacked. One that the user put there
is taken too.
"""
import contextlib
import errno
import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from urllib.request import Request, urlopen

from torch.hub import tqdm  # its own stand-in where tqdm is not installed

from sources.files import DataError

TIMEOUT = 30  # seconds without an answer, then the next address
CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    name: str
    size: int  # bytes; rounded where there is no md5
    md5: str | None
    addresses: tuple  # of the folders that serve it, tried in this order
    unpacked: int  # bytes of disk for what is taken out of it, rounded up


def bring(dataset, root, wanted):
    """Fetches and unpacks what is not in its place yet. wanted: {archive: {file or folder in it: its place}}."""
    wanted = {archive: missing for archive, parts in wanted.items()
              if (missing := {part: place for part, place in parts.items() if not place.exists()})}
    if wanted:
        root.mkdir(parents=True, exist_ok=True)
        reserve(dataset, root, list(wanted))
    else:
        print(f"{dataset}: {root} has all its files, nothing to fetch", flush=True)
    for archive, parts in wanted.items():
        unpack(fetch(archive, root), parts)


def reserve(dataset, root, archives):
    """Prints what will be downloaded and how much disk it needs. Raises DataError if the disk is too small."""
    stays = peak = 0
    for archive in archives:  # one after the other: each is deleted before the next one comes
        peak = max(peak, stays + archive.size + archive.unpacked)
        stays += archive.unpacked
    arrived = sum(path.stat().st_size for archive in archives for path in root.glob(f"{archive.name}*"))
    free = shutil.disk_usage(root).free
    size, disk, end, left = (f"{n / 1e9:.1f} GB" for n in (sum(a.size for a in archives), peak, stays, free))
    text = (f"{dataset}: fetching {', '.join(archive.name for archive in archives)}: {size}; needs {disk} of disk at "
            f"first and {end} in the end, {left} are free in {root}")
    if free < peak - arrived:
        raise DataError(f"{text}: make room, or name a folder on another disk with --data-root")
    print(text, flush=True)


def fetch(archive, root):
    """-> path of the whole archive in `root`. Raises DataError if no address gives it."""
    target, partial = root / archive.name, root / f"{archive.name}.partial"
    if target.exists():
        if archive.md5 and (found := md5_of(target)) != archive.md5:
            raise DataError(f"{target} has the md5 {found}, the official one {archive.md5}: delete it and call again")
        return target
    for folder in archive.addresses:
        print(f"{folder}{archive.name}", flush=True)
        try:
            transfer(folder + archive.name, partial, archive)
            if archive.md5 and (found := md5_of(partial)) != archive.md5:
                partial.unlink()
                raise OSError(f"its md5 is {found}, expected {archive.md5}")
            os.replace(partial, target)
            return target
        except (OSError, HTTPException) as error:  # refused, not found, too slow, cut off, another file
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise DataError(f"the disk of {root} is full: free some space and run it again, it continues") from None
            print(f"    failed: {str(error) or type(error).__name__}", flush=True)
    raise DataError(f"{archive.name} could not be downloaded from any of {len(archive.addresses)} addresses: try again "
                    f"later, or get it yourself and put it at {target}" + f" (md5 {archive.md5})" * bool(archive.md5))


def transfer(address, partial, archive):
    """Appends to `partial` what it lacks. Raises OSError or HTTPException where less than all comes."""
    if not archive.md5:  # nothing would tell a mixture of two versions
        partial.unlink(missing_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    if have >= archive.size:
        return  # the checksum says the rest
    with urlopen(Request(address, headers={"Range": f"bytes={have}-"} if have else {}), timeout=TIMEOUT) as answer:
        if answer.status != 206:  # the server sends it from the start
            have = 0
        size = have + int(answer.headers["Content-Length"] or 0)
        if archive.md5 and size != archive.size:
            raise OSError(f"it has {size:,} bytes there, expected {archive.size:,}")
        with open(partial, "ab" if have else "wb") as file, \
                tqdm(total=size, initial=have, unit="B", unit_scale=True, unit_divisor=1000) as bar:
            while chunk := answer.read(min(CHUNK, size - have)):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if have < size:
        raise OSError(f"the connection ended after {have:,} of {size:,} bytes")


def md5_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def unpack(path, parts):
    """Takes {file or folder in the archive: its place} out of an archive, nothing else; then deletes the archive."""
    print(f"unpacking {path} …", flush=True)

    def wanted(name):
        return any(name == part or name.startswith(f"{part}/") for part in parts)

    with scratch(path) as folder:
        try:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:  # drops .. and a leading / of names, checks each file's CRC
                    archive.extractall(folder, filter(wanted, archive.namelist()))
            else:
                with tarfile.open(path) as archive:
                    archive.extractall(folder, (m for m in archive if wanted(m.name)), filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{path} cannot be unpacked ({error}): delete it and call again") from None
        if absent := [part for part in parts if not (folder / part).exists()]:
            raise DataError(f"{path} holds no {absent[0]}: it is not the official archive, delete it and call again")
        for part, place in parts.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / part, place)
    path.unlink()


@contextlib.contextmanager
def scratch(target):
    """An empty folder beside `target`, to be filled and renamed. Clears what a killed call left."""
    folder = target.with_name(f".partial.{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
