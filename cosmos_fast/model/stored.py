"""Tensors of a checkpoint folder, read one by one: out of whole files, or out of the parts that ranks have written.

    whole   student.safetensors, teacher.safetensors, optimizer.safetensors
    parts   part_00000_of_00002.safetensors, part_00001_of_00002.safetensors: what each rank had of every tensor

A part holds 1-D tensors named "<weights>/<name>". Its metadata say for each at which element of the flattened tensor it
begins, and the shape of the whole tensor, so that the parts can be put together without the program that wrote them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_fast.utils.errors import UserError

FORMAT = "cosmos-fast/1"
MANIFEST = "manifest.json"
_PART = re.compile(r"part_(\d{5,})_of_(\d{5,})\.safetensors")


@dataclass(frozen=True)
class TensorSlice:
    """values: 1-D, the elements from `start` on of a tensor of `shape`, flattened."""

    values: Tensor
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """`count` elements of a tensor, the first of which is its element `start`, under `key` in a file."""

    start: int
    count: int
    file: Path
    key: str


@dataclass
class _Tensor:
    """One tensor: its shape and, in order, its pieces."""

    shape: tuple[int, ...]
    pieces: list[_Piece] = field(default_factory=list)


def part_name(rank: int, world_size: int) -> str:
    """File of one rank's part."""
    return f"part_{rank:05d}_of_{world_size:05d}.safetensors"


def part_metadata(
    slices: Mapping[str, TensorSlice], rank: int, world_size: int, model: Mapping[str, Any]
) -> dict[str, str]:
    """What a part's file says about itself."""
    return {
        "format": FORMAT,
        "rank": str(rank),
        "world_size": str(world_size),
        "model": json.dumps(model),
        "slices": json.dumps({key: [piece.start, list(piece.shape)] for key, piece in slices.items()}),
    }


def parts_in(folder: Path) -> list[Path]:
    """The parts of a folder in the order of their ranks; [] where it holds none.

    Raises:
        UserError: one is missing, or they are of runs on different numbers of ranks.
    """
    found = [(match, path) for path in folder.glob("part_*") if (match := _PART.fullmatch(path.name))]
    by_rank = {int(match[1]): path for match, path in found}
    worlds = {int(match[2]) for match, _ in found}
    if len(worlds) > 1:
        raise UserError(f"{folder} holds parts of {' and '.join(map(str, sorted(worlds)))} ranks: it is damaged")
    for rank in range(max(worlds, default=0)):
        if rank not in by_rank:
            raise UserError(f"{folder} lacks {part_name(rank, max(worlds))}")
    return [by_rank[rank] for rank in sorted(by_rank)]


def elements(named: Mapping[str, Tensor], name: str, start: int, count: int) -> Tensor:
    """Elements [start, start + count) of a flattened tensor, 1-D; of stored tensors no others are read."""
    if isinstance(named, StoredTensors):
        return named.range(name, start, count)
    return named[name].detach().reshape(-1)[start : start + count]


class StoredTensors(Mapping[str, Tensor]):
    """The student, the teacher, or the optimizer of a checkpoint folder, by name; on the CPU, read when asked for.

    metadata: of the first file.

    Raises (also where a tensor is read):
        UserError: a file that is missing or damaged, parts that do not add up to whole tensors.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self._folder = folder
        self._opened: dict[Path, Any] = {}
        self._tensors: dict[str, _Tensor] = {}
        parts = parts_in(folder)
        files = parts or [folder / f"{weights}.safetensors"]
        for file in files:
            self._open(file)
        self.metadata: dict[str, str] = self._opened[files[0]].metadata() or {}
        for file in files:
            try:
                self._index(file, f"{weights}/" if parts else None)
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{file} does not say what its tensors are part of ({error}): it is damaged") from None
        self._tensors = dict(sorted(self._tensors.items()))  # one order, however they are stored
        for name, tensor in self._tensors.items():
            tensor.pieces.sort(key=lambda piece: piece.start)
            self._check(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return self.range(name, 0, math.prod(tensor.shape)).view(tensor.shape)

    def range(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor, 1-D; no others are read."""
        found = []
        for piece in self._tensors[name].pieces:
            low, high = max(start, piece.start), min(start + count, piece.start + piece.count)
            if low < high:
                found.append(self._read(piece, low - piece.start, high - low))
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else self._read(self._tensors[name].pieces[0], 0, 0)

    def _open(self, file: Path) -> None:
        try:
            self._opened[file] = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no safetensors file ({error})") from None

    def _index(self, file: Path, prefix: str | None) -> None:
        opened = self._opened[file]
        if prefix is None:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                shape = tuple(opened.get_slice(key).get_shape())
                self._tensors[key] = _Tensor(shape, [_Piece(0, math.prod(shape), file, key)])
            return
        for key, (start, shape) in json.loads((opened.metadata() or {})["slices"]).items():
            if key.startswith(prefix):
                (count,) = opened.get_slice(key).get_shape()
                tensor = self._tensors.setdefault(key.removeprefix(prefix), _Tensor(tuple(shape)))
                if tensor.shape != tuple(shape):
                    raise ValueError(f"{key} has two shapes")
                tensor.pieces.append(_Piece(start, count, file, key))

    def _check(self, name: str, tensor: _Tensor) -> None:
        end = 0
        for piece in tensor.pieces:
            if piece.start != end:
                break
            end += piece.count
        if end != math.prod(tensor.shape):
            raise UserError(f"the parts in {self._folder} do not add up to the whole of {name}: they are damaged")

    def _read(self, piece: _Piece, start: int, count: int) -> Tensor:
        """Elements of one piece, which is 1-D or a whole tensor: of that, the rows which they lie in."""
        try:
            shape = self._opened[piece.file].get_slice(piece.key).get_shape()
            if not shape or 0 in shape:
                return self._opened[piece.file].get_tensor(piece.key).reshape(-1)[start : start + count]
            row = math.prod(shape[1:])
            first, last = start // row, -(-(start + count) // row)
            rows = self._opened[piece.file].get_slice(piece.key)[first:last]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{piece.file} cannot be read: {error}") from None
        return rows.reshape(-1)[start - first * row :][:count]
