"""Fetches archives and unpacks them, whole or not at all.

All that comes between lies in `.download` in the data set's folder; nothing else is ever deleted, and an archive that
the user put into the folder is used. An archive arrives as NAME.part; an interrupted transfer goes on from its last
byte. It gets its name once its checksum matches, whatever the server, and is deleted once it is unpacked.
"""
import contextlib
import hashlib
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from urllib.request import Request, urlopen

from sources.files import DataError
from support.lock import take_lock
from support.progress import Progress

TIMEOUT = 30  # seconds without an answer, then the next address
WAIT = 5  # seconds between looks whether another download has ended
CHUNK, MB = 1 << 20, 10**6


@dataclass(frozen=True)
class Archive:
    name: str
    size: int  # bytes; rounded where there is no md5
    md5: str | None  # without one it is a zip, whose checksums are inside
    addresses: tuple  # of the folders that serve it, tried in this order
    unpacked: int  # bytes of disk for what is taken out of it, rounded up


@contextlib.contextmanager
def workshop(root):
    """The folder `root/.download`, for one process at a time. It goes once the block has ended well."""
    folder = root / ".download"
    root.mkdir(parents=True, exist_ok=True)
    while not (lock := take_lock(root / ".download.lock")):
        print(f"another process downloads into {root}: waiting for it …", flush=True)
        time.sleep(WAIT)
    with lock:
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)


def bring(dataset, root, wanted, folder):
    """Fetches and unpacks what is not in its place yet. wanted: {archive: {file or folder in it: its place}}."""
    wanted = {archive: missing for archive, parts in wanted.items()
              if (missing := {part: place for part, place in parts.items() if not os.path.lexists(place)})}
    if wanted:
        reserve(dataset, root, list(wanted), folder)
    for archive, parts in wanted.items():
        unpack(fetch(archive, root, folder), parts, folder / "unpacked")
        (folder / archive.name).unlink(missing_ok=True)


def reserve(dataset, root, archives, folder):
    """Prints what will be downloaded and how much disk it needs. Raises DataError if the disk is too small."""
    size, stays = sum(archive.size for archive in archives), sum(archive.unpacked for archive in archives)
    peak = stays + max(archive.size for archive in archives)  # each is deleted before the next one comes
    there = [path for path in (*folder.iterdir(), *(root / archive.name for archive in archives)) if path.is_file()]
    free, arrived = shutil.disk_usage(root).free, sum(path.stat().st_size for path in there)
    text = (f"{dataset}: fetching {', '.join(archive.name for archive in archives)}: {size / 1e9:.1f} GB; needs "
            f"{peak / 1e9:.1f} GB of disk, keeps {stays / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {root}")
    if free < peak - arrived:
        raise DataError(f"{text}: make room, or name a folder on another disk with --data-root")
    print(text, flush=True)


def fetch(archive, root, folder):
    """-> path of the whole archive, the user's in `root` or ours in `folder`. Raises DataError if nobody gives it."""
    theirs, ours, partial = root / archive.name, folder / archive.name, folder / f"{archive.name}.part"
    if theirs.exists():
        if fault := differs(theirs, archive):
            raise DataError(f"{theirs} is not the official archive ({fault}): move it away and run it again")
        return theirs
    if ours.exists():  # of a call that ended before it was unpacked
        return ours
    for address in archive.addresses:
        print(f"{address}{archive.name}", flush=True)
        try:
            transfer(address + archive.name, partial, archive)
            if fault := differs(partial, archive):
                partial.unlink()
                raise OSError(fault)
            os.replace(partial, ours)
            return ours
        except (OSError, HTTPException, ValueError) as error:  # refused, not found, too slow, cut off, another file
            if getattr(error, "code", None) == 416 and not archive.md5:  # we have more than there is: another version
                partial.unlink()
            fault = str(error).strip() or type(error).__name__
            print(f"    failed: {fault}", flush=True)
    raise DataError(f"{archive.name} could not be downloaded from any of {len(archive.addresses)} addresses ({fault}): "
                    f"run it again, it continues, or get it yourself and put it at {theirs}")


def differs(path, archive):
    """What shows that a file is not the whole archive; None if nothing does."""
    if not archive.md5:
        return None if zipfile.is_zipfile(path) else "it is no whole zip archive"
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return f"its md5 is {found}, expected {archive.md5}" if found != archive.md5 else None


def transfer(address, partial, archive):
    """Appends to `partial` what it lacks. Raises OSError, HTTPException or ValueError where less than all comes."""
    have = partial.stat().st_size if partial.exists() else 0
    if have and (have >= archive.size if archive.md5 else zipfile.is_zipfile(partial)):
        return  # the checksum says the rest
    with urlopen(Request(address, headers={"Range": f"bytes={have}-"} if have else {}), timeout=TIMEOUT) as answer:
        at = have if answer.status == 206 else 0  # where the answer starts; not all servers know ranges
        kind, said = answer.headers.get_content_type(), answer.headers["Content-Range"]
        if at and not (said or "").startswith(f"bytes {at}-"):
            raise OSError(f"asked for the bytes from {at:,} on, its header says {said!r}")
        size = archive.size if archive.md5 else float("inf")  # inf: until it ends
        if answer.length is not None:  # it has a plausible Content-Length
            size = at + answer.length
        if archive.md5 and size != archive.size:
            raise OSError(f"it has {size:,} bytes there ({kind}), expected {archive.size:,}")
        progress = Progress(archive.name, archive.size // MB, "MB", have // MB)
        with open(partial, "ab") as file:
            while at < size and (chunk := answer.read1(CHUNK)):
                if at == 0 and b"\0" not in chunk[:512]:  # text; all headers of archives hold zeros
                    raise OSError(f"it sends {kind} and no archive: {chunk[:60]!r}")
                file.write(chunk[max(have - at, 0):])
                at += len(chunk)
                progress.say(at // MB)
    if at < size < float("inf"):
        raise OSError(f"the connection ended after {at:,} of {size:,} bytes")


def unpack(path, parts, scratch):
    """Takes {file or folder in the archive: its place} out of an archive, nothing else. Raises DataError."""
    def wanted(members):
        progress = Progress(path.name, path.stat().st_size // MB, "MB unpacked")
        for member in members:
            name = getattr(member, "name", member)
            if any(name == part or name.startswith(f"{part}/") for part in parts):
                yield member
            progress.say(file.tell() // MB)

    print(f"unpacking {path} …", flush=True)
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed call
    try:
        with open(path, "rb") as file:
            if path.suffix == ".zip":
                with zipfile.ZipFile(file) as archive:  # drops .. and a leading / of names, checks each file's CRC
                    archive.extractall(scratch, wanted(archive.namelist()))
            else:
                with tarfile.open(fileobj=file) as archive:
                    archive.extractall(scratch, wanted(archive), filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}): move it away and run it again") from None
    if absent := [part for part in parts if not (scratch / part).exists()]:
        raise DataError(f"{path} holds no {absent[0]}, it is not the official archive: move it away and run it again")
    for part, place in parts.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / part, place)
