"""Caption tables as they are published: rows of CSV, TSV and parquet files, one at a time."""

from __future__ import annotations

import csv
import glob
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_fast.data.prepare import parquet
from cosmos_fast.data.prepare.layouts import Layout
from cosmos_fast.data.records import MAX_RECORD_BYTES
from cosmos_fast.utils.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (*_DELIMITERS, ".parquet")
BROKEN_ROW = "broken row"


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read. join: the one that says which image a row belongs to."""

    join: str
    captions: tuple[str, ...]


@dataclass
class TableReader:
    """Rows of several files in order.

    join_column: the column of URLs or names; None takes the layout's URL column. problems: what was met, counted.
    """

    files: Sequence[Path]
    layout: Layout
    join_column: str | None = None
    problems: Counter[str] = field(default_factory=Counter)

    def check(self) -> list[Columns]:
        """What is read of each file. Raises UserError: one is unreadable, or lacks the columns."""
        return [self._columns(path) for path in self.files]

    def rows(self, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[tuple[str, dict[str, Any]]]:
        """(join value, row) of every row that can be read; on_bytes gets the bytes of the files passed since.

        Raises UserError as check() does, and where a file cannot be read further.
        """
        for path, chosen in zip(self.files, self.check(), strict=True):
            size, reported = path.stat().st_size, 0
            for share, row in self._rows_of(path, chosen):
                value = row.get(chosen.join)
                if not isinstance(value, str) or not value.strip():
                    self.problems[f"no {chosen.join}"] += 1
                    continue
                yield value.strip(), row
                if (passed := int(share * size)) - reported > 1 << 20:
                    on_bytes(passed - reported)
                    reported = passed
            on_bytes(size - reported)

    def _columns(self, path: Path) -> Columns:
        names = parquet.column_names(path) if path.suffix == ".parquet" else _header(path)
        wanted = (self.join_column,) if self.join_column else self.layout.url
        join = next((name for name in wanted if name in names), None)
        captions = tuple(name for name in self.layout.columns if name in names)
        if join is None or not any(name in names for name in self.layout.needed):
            missing = repr(wanted[0]) if join is None else "one of " + ", ".join(map(repr, self.layout.needed))
            raise UserError(
                f"{path} is no table of {self.layout.name}: it needs a column {missing} and has {', '.join(names)}"
            )
        return Columns(join, captions)

    def _rows_of(self, path: Path, columns: Columns) -> Iterator[tuple[float, dict[str, Any]]]:
        if path.suffix == ".parquet":
            return parquet.read_rows(path, list(dict.fromkeys((columns.join, *columns.captions))))
        return self._csv_rows(path)

    def _csv_rows(self, path: Path) -> Iterator[tuple[float, dict[str, Any]]]:
        size = max(path.stat().st_size, 1)
        try:
            with path.open("rb") as raw:
                lines = _Lines(raw)
                reader = _csv_reader(path, lines)
                header = next(reader)
                while True:
                    try:
                        row = next(reader)
                    except StopIteration:
                        return
                    except csv.Error:  # a quote that is closed too late, or a null byte: the reader goes on behind it
                        self.problems[BROKEN_ROW] += 1
                        continue
                    if lines.ended:  # within a row: its quote is never closed, the rest of the file is in its last cell
                        self.problems[BROKEN_ROW] += 1
                    elif len(row) == len(header):
                        yield raw.tell() / size, dict(zip(header, row, strict=True))
                    elif row:  # an empty line is no row
                        self.problems[BROKEN_ROW] += 1
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def table_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths name: files, globs, or directories of tables. Raises UserError where there is none."""
    found: list[Path] = []
    for path in paths:
        where = Path(path).expanduser()
        if where.is_dir():
            files = sorted(file for file in where.iterdir() if file.suffix in _ENDINGS)
            if not files:
                raise UserError(f"{where} holds no caption table ({', '.join(_ENDINGS)}); check the path")
        elif where.exists():
            files = [where]
        else:
            files = sorted(Path(match) for match in glob.glob(str(where), recursive=True))
            if not files:
                raise UserError(f"caption table {path!r} is not there; check the path")
        found.extend(files)
    for file in found:
        if file.suffix not in _ENDINGS:
            raise UserError(f"{file}: caption tables are {', '.join(_ENDINGS)} files; decompress or convert it first")
    return found


class _Lines:
    """Lines of a table. ended: another one was asked for and there was none."""

    def __init__(self, raw: io.BufferedReader) -> None:
        # utf-8-sig: spreadsheets write a byte order mark; newline="": captions hold line breaks
        self._text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline()
        if not line:
            self.ended = True
            raise StopIteration
        return line


def _header(path: Path) -> list[str]:
    try:
        with path.open("rb") as raw:
            return next(_csv_reader(path, _Lines(raw)), [])
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _csv_reader(path: Path, lines: _Lines) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    return csv.reader(lines, delimiter=_DELIMITERS[path.suffix])
