"""Files of plain data: written whole or not at all, checked when read, never run. Knows no model and no state.

A file is a header (magic, version, length, SHA-256 of everything else) and what `torch.save` writes. Where its name
ends in `.safetensors` it is of that format, with everything but the tensors as JSON in its metadata.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import stat
import struct
from functools import partial
from typing import Any

import torch
from torch import Tensor

VERSION = 1
MAGIC = b"\x93fluxpy\n"
HEADER = struct.Struct("<8sIQ32s")  # the same in all versions, so that a file of any can say which it has
DIGEST_KEY = b'"sha256":"'  # in a safetensors header, before the digest, which is that of the file with zeros there

KINDS = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def write(path: str, data: dict[str, Any]) -> None:
    """Write plain data to a file. A symbolic link stays one: the file that it points to is replaced, with its mode."""
    mode = _mode(path)
    if path.endswith(".safetensors"):
        pieces = _to_safetensors(data)
    else:
        buffer = io.BytesIO()
        torch.save(data, buffer)
        payload = buffer.getbuffer()
        head = HEADER.pack(MAGIC, VERSION, len(payload), b"")[:-32]
        pieces = head, digest(head, payload), payload
    _replace(os.path.realpath(path), pieces, mode)


def read(path: str, where: str) -> Any:
    """What `write` was given, tensors on the CPU. ValueErrors begin with `where`."""
    with open(path, "rb") as file:
        raw = memoryview(file.read())
    if raw[:8] == MAGIC:
        return _from_payload(raw, where)
    if path.endswith(".safetensors"):
        return _from_safetensors(raw, where)
    if MAGIC.startswith(bytes(raw[:8])):
        raise ValueError(f"{where} is truncated: it has {len(raw)} bytes")
    hint = "; torch.save writes such files: read it by torch.load" if raw[:4] == b"PK\3\4" else ""
    raise ValueError(f"{where} is no checkpoint of fluxpy{hint}")


def digest(*pieces: Any) -> bytes:
    """The SHA-256 of the pieces one after another."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.digest()


def _mode(path: str) -> int | None:
    """The permissions of the file at `path`, None where there is none. Whatever is no regular file is refused."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise ValueError(f"save: {path!r} is {kind}; save replaces the file, so it must be a regular one")
    return stat.S_IMODE(mode) & 0o777


def _replace(path: str, pieces: tuple[Any, ...], mode: int | None) -> None:
    """Put the pieces into the file at `path`, all or nothing. An interrupted write leaves a `.fluxpy-<process>-*.tmp`.

    `mode` is that of the file that is replaced; a new file has the usual one.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".fluxpy-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        # From the first byte on it may be read by those only who may read the file itself.
        with open(temporary, "xb", opener=partial(os.open, mode=0o666 if mode is None else mode)) as file:
            if mode is not None and mode != stat.S_IMODE(os.fstat(file.fileno()).st_mode):
                os.chmod(temporary, mode)  # more than the umask lets a new file have
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = path
            del error.filename2  # where that is None, the message would still have it
        raise


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files that killed processes left in a folder, but none that a living one may be writing."""
    if os.name == "nt":  # where to ask whether a process lives may end it
        return
    for name in os.listdir(folder):
        found = re.fullmatch(r"\.fluxpy-(\d+)-[0-9a-f]{16}\.tmp", name)
        if found and not _lives(int(found[1])):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _sync_folder(folder: str) -> None:
    """Flush the renaming to the disk."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _from_payload(raw: memoryview, where: str) -> Any:
    if len(raw) < HEADER.size:
        raise ValueError(f"{where} is truncated: it ends within its header")
    _, version, length, expected = HEADER.unpack_from(raw)
    payload = raw[HEADER.size :]
    if len(payload) < length:
        raise ValueError(f"{where} is truncated, or its header altered: {len(payload):,} of {length:,} bytes are there")
    _check(digest(raw[: HEADER.size - 32], payload) == expected, version, where)
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{where} cannot be read as plain data, and nothing else is read: {error}") from error


def _check(whole: bool, version: Any, where: str) -> None:
    if not whole:
        raise ValueError(f"{where} was altered or truncated: its checksum is another")
    if version != VERSION:
        raise ValueError(f"{where} was written by a newer fluxpy, as version {version}; this one reads {VERSION}")


# --- Safetensors --------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files that end in .safetensors need that package: pip install safetensors") from error
    return safetensors.torch


def _to_safetensors(data: dict[str, Any]) -> tuple[Any, ...]:
    library, packer = _safetensors(), _Packer()
    packed = {key: packer.pack(value, key) for key, value in data.items()}
    metadata = {"fluxpy": json.dumps({"version": VERSION, "data": packed}), "sha256": "0" * 64}
    try:
        raw = memoryview(library.save(packer.tensors, metadata))
    except Exception as error:
        raise ValueError(f"save: safetensors cannot hold this: {error}") from error
    start = _digest_start(raw)
    return raw[:start], digest(raw).hex().encode(), raw[start + 64 :]


def _header(raw: memoryview) -> bytes:
    """The first eight bytes of a safetensors file say how long its header is; it is JSON."""
    return bytes(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def _digest_start(raw: memoryview) -> int:
    return 8 + _header(raw).index(DIGEST_KEY) + len(DIGEST_KEY)


class _Packer:
    """Takes the tensors out of plain data and makes JSON of the rest, in which each is named."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # of each tensor by its id
        self._storages: set[int] = set()  # safetensors refuses two tensors in one

    def pack(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._name(value, place)}
        if isinstance(value, dict):
            return {"dict": [[key, self.pack(v, f"{place}.{key}")] for key, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [self.pack(v, f"{place}.{i}") for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        return value

    def _name(self, t: Tensor, place: str) -> str:
        if id(t) not in self._names:
            name = place if place not in self.tensors else f"{place}#{len(self.tensors)}"
            storage = t.untyped_storage().data_ptr()
            self.tensors[name] = t.clone() if storage in self._storages else t.contiguous()
            self._storages.add(storage)
            self._names[id(t)] = name
        return self._names[id(t)]


class _Unpacker:
    """The way back. Equal rules and schedules become one object: leaves that shared a rule share it again."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._shared: dict[str, Any] = {}

    def unpack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.unpack(v) for v in value]
        if not isinstance(value, dict):
            return value
        [(kind, inside)] = value.items()
        if kind == "tensor":
            return self._tensors[inside]
        if kind == "tuple":
            return tuple([self.unpack(v) for v in inside])
        new = {key: self.unpack(v) for key, v in inside}
        return self._shared.setdefault(json.dumps(value), new) if "type" in new else new


def _from_safetensors(raw: memoryview, where: str) -> Any:
    library = _safetensors()
    try:
        start = _digest_start(raw)
        whole = digest(raw[:start], b"0" * 64, raw[start + 64 :]).hex().encode() == raw[start : start + 64]
        metadata = json.loads(json.loads(_header(raw))["__metadata__"]["fluxpy"]) if whole else {}
        if not isinstance(metadata, dict):
            raise TypeError("its metadata must be a JSON object")
    except Exception as error:
        raise ValueError(f"{where} is no safetensors file that fluxpy.save wrote, or was altered: {error}") from error
    _check(whole, metadata.get("version"), where)
    try:
        unpacker = _Unpacker(library.load(bytes(raw)))
        return {key: unpacker.unpack(value) for key, value in metadata["data"].items()}
    except Exception as error:
        raise ValueError(f"{where} cannot be read as plain data: {error}") from error
