"""A folder that OpenCLIP loads: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from cosmos_fast.data.images import MEAN, STD
from cosmos_fast.exchange.source import Source
from cosmos_fast.exchange.towers import tower_weights
from cosmos_fast.model.checkpoints import FORMAT


def write(source: Source, folder: Path) -> None:
    """`open_clip_config.json` and `open_clip_model.safetensors`, which `load_checkpoint` reads as well."""
    ((name, model),) = source.models.items()
    weights, config = tower_weights(model)
    described = config.to_openclip()
    metadata = {"format": FORMAT, "weights": name, "model": json.dumps(described)}
    save_file(weights, folder / "open_clip_model.safetensors", metadata)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    shown = {key: described[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    content = json.dumps({"model_cfg": shown, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(content + "\n", encoding="utf-8")
