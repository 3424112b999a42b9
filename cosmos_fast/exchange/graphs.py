"""Folders with a graph for each encoder, ONNX or of torch.export, and a config.json that says how to feed them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_fast.data.images import MEAN, STD
from cosmos_fast.exchange.dense import ImageEncoder, TextEncoder
from cosmos_fast.exchange.source import Source

_ONE_FILE_BYTES = 2**31 - 2**24  # protobuf's limit, less the graph


def write_onnx(source: Source, folder: Path) -> None:
    """`image.onnx`, `text.onnx`: one input `images` or `tokens`, one output `features`, any batch size."""

    def write(encoder: nn.Module, example: Tensor, name: str, file: Path) -> None:
        size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(
            encoder,
            (example,),
            str(file.with_suffix(".onnx")),
            input_names=[name],
            output_names=["features"],
            dynamic_shapes={name: {0: batch}},
            dynamo=True,
            external_data=size > _ONE_FILE_BYTES,
            verbose=False,
        )

    _write(source, folder, write)


def write_torch_export(source: Source, folder: Path) -> None:
    """`image.pt2`, `text.pt2`, for `torch.export.load`, any batch size."""

    def write(encoder: nn.Module, example: Tensor, name: str, file: Path) -> None:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(encoder, (example,), dynamic_shapes={name: {0: batch}})
        content = io.BytesIO()  # torch ends the process where a disk takes no more; Python raises an OSError
        torch.export.save(program, content)
        file.with_suffix(".pt2").write_bytes(content.getbuffer())

    _write(source, folder, write)


def _write(source: Source, folder: Path, write: Callable[[nn.Module, Tensor, str, Path], None]) -> None:
    (model,) = source.models.values()
    model.requires_grad_(False)
    vision, text = model.config.vision, model.config.text
    # A batch of three: dimensions of 0 and 1 would be taken for constants.
    images = torch.zeros(3, 3, vision.image_size, vision.image_size)
    tokens = torch.zeros(3, text.context_length, dtype=torch.int64)
    write(ImageEncoder(model).eval(), images, "images", folder / "image")
    write(TextEncoder(model).eval(), tokens, "tokens", folder / "text")
    described = {
        "image_size": vision.image_size,
        "image_mean": MEAN,
        "image_std": STD,
        "context_length": text.context_length,
        "embed_dim": model.config.embed_dim,
        "logit_scale": float(model.logit_scale.exp()),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
