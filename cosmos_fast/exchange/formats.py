"""The formats that weights are exported to. Light: the module of a format is imported when it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosmos_fast.exchange.source import Source


@dataclass(frozen=True)
class Format:
    """module: of cosmos_fast.exchange, has `function(source, path)`. summary: for the command's help. suffix: of the
    file; empty for a folder. files: what a folder may hold. both: it takes student and teacher. needs: packages."""

    module: str
    summary: str
    suffix: str = ""
    files: frozenset[str] = frozenset()
    both: bool = False
    needs: tuple[str, ...] = ()
    function: str = "write"

    @property
    def write(self) -> Callable[[Source, Path], None]:
        """Write the models of a source as a new file at a path, or into the new folder there."""
        found: Callable[[Source, Path], None] = getattr(
            import_module(f"cosmos_fast.exchange.{self.module}"), self.function
        )
        return found


FORMATS = {
    "original": Format("original", "a .pt file laid out as the released ones", ".pt", both=True),
    "safetensors": Format("plain", "a .safetensors file of one model, under the original's names", ".safetensors"),
    "open_clip": Format(
        "open_clip",
        "a folder for open_clip's `local-dir:`; the towers, without COSMOS' heads",
        files=frozenset({"open_clip_config.json", "open_clip_model.safetensors"}),
    ),
    "hf": Format(
        "hf",
        "a folder for transformers' CLIPModel and CLIPProcessor; the towers, without COSMOS' heads",
        files=frozenset(
            {
                *("config.json", "model.safetensors", "preprocessor_config.json"),
                *("vocab.json", "merges.txt", "tokenizer_config.json"),
            }
        ),
    ),
    "onnx": Format(
        "graphs",
        "a folder with image.onnx and text.onnx, and how to feed them",
        files=frozenset(
            {"config.json", *(f"{name}.onnx{data}" for name in ("image", "text") for data in ("", ".data"))}
        ),
        needs=("onnx", "onnxscript"),
        function="write_onnx",
    ),
    "torch_export": Format(
        "graphs",
        "a folder with image.pt2 and text.pt2 for torch.export.load, and how to feed them",
        files=frozenset({"config.json", "image.pt2", "text.pt2"}),
        function="write_torch_export",
    ),
}
