"""The home of Weights & Biases: imported only when run.wandb is on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_fast.utils.errors import UserError


class WandbSink:
    """Numbers as `<kind>/<key>`, one W&B run a run folder; a resumed run continues it."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("run.wandb is on, but wandb is missing: pip install wandb") from None
        self._run = wandb.init(
            project="cosmos-fast", name=name, id=_run_id(folder), resume="allow", dir=str(folder), config=dict(config)
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Log every number of the row at its step."""
        numbers = {f"{row['kind']}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        self._run.log(numbers, step=row["step"])

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """Kept in the run folder, so that a resumed run finds itself again."""
    import uuid

    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
