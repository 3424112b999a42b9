"""What OpenCLIP's `open_clip_config.json` says of the weights beside it that their shapes do not: heads, activation."""

from __future__ import annotations

import json
from pathlib import Path

from cosmos_fast.config import ModelConfig
from cosmos_fast.model.weights import DESCRIPTION
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.hub import local_path


def local_weights(path: str | Path) -> Path:
    """As local_path(): of weights on the hub the description is downloaded too, so that it lies beside the copy."""
    return local_path(path, beside=DESCRIPTION)


def described_beside(file: Path) -> ModelConfig | None:
    """The architecture that the file beside weights describes, None where there is none.

    Raises:
        UserError: it is damaged, or describes what this model cannot compute.
    """
    beside = file.parent / DESCRIPTION
    if not beside.is_file():
        return None
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))["model_cfg"]
        known = {name: value for name, value in described.items() if name not in ("quick_gelu", "crossmodal")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{DESCRIPTION} beside it is damaged, or none of OpenCLIP's") from None
    if described.get("quick_gelu", False) is not False:
        raise UserError(f"{DESCRIPTION} beside it says quick_gelu, an activation that is not supported")
    try:
        return ModelConfig.from_openclip({**known, "crossmodal": False})
    except UserError as error:
        raise UserError(f"{DESCRIPTION} beside it: {error}") from None
