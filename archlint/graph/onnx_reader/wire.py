"""A walk over protobuf's wire format that takes large raw tensors out of a model before parsing.

protobuf copies every ``raw_data`` field it parses. A model of half a gigabyte is parsed here from a
few kilobytes: each large ``raw_data`` of an initializer or of a ``Constant`` node is replaced by an
external-data entry that points back into the same file. (Protocol buffers: encoding; the field
numbers are those of onnx.proto.)
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap

Buffer = bytes | mmap
SMALL = 1024  # bytes of raw_data that are left where they are

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# onnx.proto: message type -> field number -> the message type to walk into.
_WALK: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_RAW_DATA = 9
_EXTERNAL_DATA = 13
_DATA_LOCATION = 14
_MOST_NESTED = 100  # messages within messages, as protobuf itself allows


class WireError(ValueError):
    """The bytes are no well-formed protobuf message."""


def _varint(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("a number runs past the end")


def fields(buffer: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, start of the key, start of the payload, end) of each field."""
    while at < end:
        start = at
        key, at = _varint(buffer, at, end)
        wire = key & 7
        if wire == _BYTES:
            length, at = _varint(buffer, at, end)
            stop = at + length
        elif wire == _VARINT:
            _, stop = _varint(buffer, at, end)
        elif wire == _FIXED64:
            stop = at + 8
        elif wire == _FIXED32:
            stop = at + 4
        else:
            raise WireError(f"wire type {wire}")
        if stop > end or key >> 3 == 0:
            raise WireError("a field runs past the end")
        yield key >> 3, wire, start, at, stop
        at = stop


def _encode(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """One field of bytes: a string, a message."""
    return _encode(number << 3 | _BYTES) + _encode(len(payload)) + payload


def _entry(key: str, value: str) -> bytes:
    return field(_EXTERNAL_DATA, field(1, key.encode()) + field(2, value.encode()))


def slim(buffer: Buffer, size: int, location: str) -> bytes:
    """The model's bytes with every large ``raw_data`` replaced by a reference.

    The reference is an external-data entry with ``location``, the offset in ``buffer`` and the
    length in bytes. Raises WireError where the bytes are not well-formed.
    """
    return b"".join(_slim(buffer, 0, size, "model", location, 0))


def _slim(
    buffer: Buffer, at: int, end: int, kind: str, location: str, depth: int
) -> Iterator[bytes]:
    if depth > _MOST_NESTED:
        raise WireError("the depth of nested messages is beyond what protobuf reads")
    inner = _WALK.get(kind, {})
    reference: tuple[int, int] | None = None
    kept = at  # everything from here to the current field is copied as it is
    for number, wire, start, payload, stop in fields(buffer, at, end):
        if wire != _BYTES or stop - payload <= SMALL:
            continue
        if kind == "tensor" and number == _RAW_DATA:
            yield buffer[kept:start]
            reference = (payload, stop - payload)
            kept = stop
        elif number in inner:
            yield buffer[kept:start]
            child = b"".join(_slim(buffer, payload, stop, inner[number], location, depth + 1))
            yield field(number, child)
            kept = stop
    yield buffer[kept:end]
    if reference is not None:  # last, since the last data_location is the one that counts
        yield _entry("location", location)
        yield _entry("offset", str(reference[0]))
        yield _entry("length", str(reference[1]))
        yield _encode(_DATA_LOCATION << 3 | _VARINT) + b"\x01"
