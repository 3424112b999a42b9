"""Rows of parquet files, by pyarrow: the only module that imports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cosmos_fast.utils.errors import UserError

_BATCH_ROWS = 1024


def column_names(path: Path) -> list[str]:
    """The columns of a file. UserError: pyarrow is not installed, or this is no parquet file."""
    return list(_open(path).schema_arrow.names)


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[float, dict[str, Any]]]:
    """(share of the file read by then, row) for every row; values are Python's own. Raises UserError."""
    file = _open(path)
    total, done = max(file.metadata.num_rows, 1), 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            for row in batch.to_pylist():
                done += 1
                yield done / total, row
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise UserError(f"cannot read {path}: {_first_line(error)}; download it again") from error


def _open(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet files are read by pyarrow: pip install 'cosmos-fast[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no whole parquet file ({_first_line(error)}); download it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
