"""Tar headers, read directly: where every member of a shard lies. Nothing is extracted.

Reads ustar, GNU long names and PAX (path, size). Links, devices and sparse files, of GNU's format or of PAX, are not
samples and are reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cosmos_fast.data import faults
from cosmos_fast.data.faults import Fault
from cosmos_fast.data.shard_reader import ShardReader

BLOCK = 512
_ZERO_BLOCK = bytes(BLOCK)
_MAX_NAME_BYTES = 1 << 20  # a longer GNU name or PAX header is an attack, not a name
_REGULAR = (b"0", b"\0", b"7")
_SPARSE = "GNU.sparse."  # the fields of a sparse file in a PAX header


@dataclass(frozen=True)
class Member:
    """One regular file of a shard: name, first byte of its data in the shard, size in bytes."""

    name: str
    offset: int
    size: int


def scan(reader: ShardReader, problems: list[Fault]) -> Iterator[Member]:
    """Yield the whole members of a shard in file order; what is wrong with it is appended to `problems`.

    A member that runs past the end of the file ends the scan: its name stands in the problem's detail. Raises what the
    reader does: OSError, StorageError.
    """
    shard, file_size = reader.name, reader.size
    position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while position + BLOCK <= file_size:
        header = reader.read(position, BLOCK)
        if header == _ZERO_BLOCK:
            return
        if len(header) < BLOCK or not _checksum_holds(header):
            cause = faults.CORRUPT_SHARD if position else faults.NOT_A_TAR
            problems.append(Fault(cause, shard, f"at byte {position}; members after it are lost"))
            return
        kind = header[156:157]
        name = long_name or pax.get("path") or _header_name(header)
        size = int(pax["size"]) if pax.get("size", "").isdigit() else _number(header[124:136])
        data = position + BLOCK + (_more_holes(reader, position) if kind == b"S" else 0)
        position = data + -(-size // BLOCK) * BLOCK
        if size < 0 or data + size > file_size:
            problems.append(Fault(faults.TRUNCATED_SHARD, shard, f"in member {name}; {file_size} bytes are left"))
            return
        if kind in (b"L", b"x"):
            if size > _MAX_NAME_BYTES:
                problems.append(Fault(faults.CORRUPT_SHARD, shard, f"a name of {size} bytes at byte {data}"))
                return
            text = reader.read(data, size)
            if kind == b"L":
                long_name = text.split(b"\0", 1)[0].decode("utf-8", "replace")
            else:
                pax = _pax_fields(text)
            continue
        if any(field.startswith(_SPARSE) for field in pax):  # its header says "regular", under another name
            where = f"{shard}:{pax.get(_SPARSE + 'name', name)}"
            problems.append(Fault(faults.UNUSABLE_MEMBER, where, "a sparse file"))
        elif kind in _REGULAR:
            yield Member(name, data, size)
        elif kind not in (b"5", b"g", b"K"):  # directories, global headers, long link names carry no sample
            problems.append(Fault(faults.UNUSABLE_MEMBER, f"{shard}:{name}", f"tar type {kind!r}"))
        if kind not in (b"g", b"K"):
            long_name, pax = None, {}
    # A whole archive ends in zero blocks and has returned above.
    problems.append(Fault(faults.TRUNCATED_SHARD, shard, "no end marker" if file_size else "it is empty"))


def _more_holes(reader: ShardReader, position: int) -> int:
    """Bytes of the blocks between the header at `position` of a sparse file (GNU) and its data: each, as the header,
    says whether another follows."""
    more, at = 0, 482
    while position + more + at < reader.size and reader.read(position + more + at, 1) != b"\0":
        more, at = more + BLOCK, 504
    return more


def _checksum_holds(header: bytes) -> bool:
    stored = header[148:156].split(b"\0", 1)[0].strip()
    try:
        expected = int(stored, 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == expected


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[262:264] != b" \0":  # GNU keeps times where ustar keeps the prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def _number(field: bytes) -> int:
    """Octal text, or base 256 where the first bit is set; -1 when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return -1


def _pax_fields(text: bytes) -> dict[str, str]:
    """`length key=value newline` records; whatever does not parse ends the list."""
    fields: dict[str, str] = {}
    start = 0
    while start < len(text):
        space = text.find(b" ", start)
        if space < 0 or not text[start:space].isdigit():
            break
        end = start + int(text[start:space])
        if end <= space:
            break
        key, _, value = text[space + 1 : end - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        start = end
    return fields
