"""Files of plain data: written whole or not at all, checked when read, never run. Knows no model and no state.

A file is a header (magic, version, length, SHA-256 of all the rest) and what `torch.save` writes; or, where its name
ends in `.safetensors`, of that kind, with all that is no tensor as JSON in its metadata.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import struct
from typing import Any

import torch
from torch import Tensor

_VERSION = 1
_MAGIC = b"\x93fluxpy\n"
_HEADER = struct.Struct("<8sIQ32s")  # the same in all versions, so that a file of any can say which it has
_DIGEST = b'"sha256":"'  # in safetensors this stands before the digest, which is that of the file with zeros there


def write(path: str, data: dict[str, Any]) -> None:
    """Plain data to a file. A link stays one: what it points to is replaced."""
    target = os.path.realpath(path)
    if path.endswith(".safetensors"):
        return _replace(target, *_to_safetensors(data))
    buffer = io.BytesIO()
    torch.save(data, buffer)
    payload = buffer.getbuffer()
    head = _HEADER.pack(_MAGIC, _VERSION, len(payload), b"")[:-32]
    _replace(target, head, _digest(head, payload), payload)


def read(path: str, at: str) -> Any:
    """What `write` was given, tensors on the CPU. ValueErrors begin with `at`."""
    with open(path, "rb") as file:
        raw = memoryview(file.read())
    if raw[:8] == _MAGIC:
        return _from_payload(raw, at)
    if path.endswith(".safetensors"):
        return _from_safetensors(raw, at)
    if _MAGIC.startswith(bytes(raw[:8])):
        raise ValueError(f"{at} is truncated: it has {len(raw)} bytes")
    hint = "; torch.save writes such files: read it by torch.load" if raw[:4] == b"PK\3\4" else ""
    raise ValueError(f"{at} is no checkpoint of fluxpy{hint}")


def _replace(path: str, *pieces: Any) -> None:
    """All of it under this name, or nothing. What an interrupted write leaves is called `.fluxpy-*.tmp`."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".fluxpy-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # where a folder cannot be opened
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = path, None
        raise


def _from_payload(raw: memoryview, at: str) -> Any:
    if len(raw) < _HEADER.size:
        raise ValueError(f"{at} is truncated: it ends within its header")
    _, version, length, digest = _HEADER.unpack_from(raw)
    payload = raw[_HEADER.size :]
    if len(payload) < length:
        raise ValueError(f"{at} is truncated, or its header altered: {len(payload):,} of {length:,} bytes are there")
    _check(_digest(raw[: _HEADER.size - 32], payload) == digest, version, at)
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{at} cannot be read as plain data, and nothing else is read: {error}") from error


def _check(whole: bool, version: Any, at: str) -> None:
    if not whole:
        raise ValueError(f"{at} was altered or truncated: its checksum is another")
    if version != _VERSION:
        raise ValueError(f"{at} was written by a newer fluxpy, as version {version}; this one reads {_VERSION}")


def _digest(*pieces: Any) -> bytes:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.digest()


# --- Safetensors --------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files that end in .safetensors need that package: pip install safetensors") from error
    return safetensors.torch


def _to_safetensors(data: dict[str, Any]) -> tuple[Any, ...]:
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()

    def pack(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = place = place if place not in tensors else f"{place}#{len(tensors)}"
                memory = value.untyped_storage().data_ptr()
                tensors[place] = value.clone() if memory in storages else value.contiguous()
                storages.add(memory)
            return {"tensor": names[id(value)]}
        if isinstance(value, dict):
            return {"dict": [[k, pack(v, f"{place}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [pack(v, f"{place}.{i}") for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        return value

    library = _safetensors()
    rest = json.dumps({"version": _VERSION, "data": {k: pack(v, k) for k, v in data.items()}})
    try:
        raw = memoryview(library.save(tensors, {"fluxpy": rest, "sha256": "0" * 64}))
    except Exception as error:
        raise ValueError(f"save: safetensors cannot hold this: {error}") from error
    start = bytes(raw[: 8 + int.from_bytes(raw[:8], "little")]).index(_DIGEST) + len(_DIGEST)
    return raw[:start], _digest(raw).hex().encode(), raw[start + 64 :]


def _from_safetensors(raw: memoryview, at: str) -> Any:
    library = _safetensors()
    shared: dict[str, Any] = {}  # rules that were one object

    def unpack(value: Any) -> Any:
        if isinstance(value, list):
            return [unpack(v) for v in value]
        if not isinstance(value, dict):
            return value
        [(kind, inside)] = value.items()
        if kind == "tensor":
            return tensors[inside]
        if kind == "tuple":
            return tuple([unpack(v) for v in inside])
        new = {k: unpack(v) for k, v in inside}
        return shared.setdefault(json.dumps(value), new) if "type" in new else new

    try:
        head = bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
        start = head.index(_DIGEST) + len(_DIGEST)
        zeros = b"0" * 64
        whole = _digest(raw[:start], zeros, raw[start + 64 :]).hex() == head[start : start + 64].decode()
        rest = json.loads(json.loads(head[8:])["__metadata__"]["fluxpy"]) if whole else {}
    except Exception as error:
        raise ValueError(f"{at} is no safetensors file that fluxpy.save wrote, or was altered: {error}") from error
    _check(whole, rest.get("version"), at)
    try:
        tensors = library.load(bytes(raw))
        return {k: unpack(v) for k, v in rest["data"].items()}
    except Exception as error:
        raise ValueError(f"{at} cannot be read as plain data: {error}") from error
