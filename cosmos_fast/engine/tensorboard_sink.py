"""The home of TensorBoard: imported only when run.tensorboard is on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_fast.utils.errors import UserError


class TensorBoardSink:
    """Scalars as `<kind>/<key>` in `<run>/tensorboard`."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("run.tensorboard is on, but tensorboard is missing: pip install tensorboard") from None
        # Events later than the step a run resumes at are hidden: it writes them again.
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add every number of the row."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()
