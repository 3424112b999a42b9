"""Architecture: the two towers and the cross-attention heads of COSMOS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cosmos_fast.config.checks import require, require_multiple, require_positive
from cosmos_fast.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision transformer.

    image_size: side of a global crop, pixels. patch_size: side of a patch, pixels. width: channels. layers: blocks.
    head_width: channels of one attention head.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64

    def __post_init__(self) -> None:
        require_positive("model.vision", self, "image_size", "patch_size", "width", "layers", "head_width")
        require_multiple("model.vision.image_size", self.image_size, "model.vision.patch_size", self.patch_size)
        require_multiple("model.vision.width", self.width, "model.vision.head_width", self.head_width)

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self.width // self.head_width


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Causal text transformer.

    context_length: tokens of a caption, start and end included. vocab_size: token ids. width: channels.
    heads: attention heads of a block. layers: blocks.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12

    def __post_init__(self) -> None:
        require_positive("model.text", self, "vocab_size", "width", "heads", "layers")
        require(self.context_length >= 3, f"model.text.context_length is {self.context_length}: at least 3 are needed")
        require_multiple("model.text.width", self.width, "model.text.heads", self.heads)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dual encoder. crossmodal=False is plain CLIP: no token maps, no poolers, no distill_logit_scale.

    embed_dim: channels of the shared embedding. pool_heads: attention heads of the cross-attention poolers.
    """

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    crossmodal: bool = True
    pool_heads: int = 8

    def __post_init__(self) -> None:
        require_positive("model", self, "embed_dim", "pool_heads")
        if self.crossmodal:
            require_multiple("model.embed_dim", self.embed_dim, "model.pool_heads", self.pool_heads)

    @classmethod
    def from_openclip(cls, openclip: Mapping[str, Any]) -> ModelConfig:
        """Read an OpenCLIP model dict (`embed_dim`, `vision_cfg`, `text_cfg`; ours adds `crossmodal`, `pool_heads`)."""
        require(isinstance(openclip, Mapping), f"model: expected a dict, not a {type(openclip).__name__}")
        known = {"embed_dim", "vision_cfg", "text_cfg", "crossmodal", "pool_heads"}
        _refuse_unknown("model", openclip, known)
        for key in ("embed_dim", "vision_cfg", "text_cfg"):
            require(key in openclip, f"model: {key!r} is missing from the OpenCLIP dict")
        for key in ("embed_dim", "pool_heads"):
            value = openclip.get(key, 1)
            require(type(value) is int, f"model: {key} must be a whole number, not {value!r}")
        return cls(
            embed_dim=openclip["embed_dim"],
            vision=VisionConfig(**_whole_numbers(openclip, "vision_cfg", VisionConfig)),
            text=TextConfig(**_whole_numbers(openclip, "text_cfg", TextConfig)),
            crossmodal=bool(openclip.get("crossmodal", True)),
            pool_heads=openclip.get("pool_heads", 8),
        )

    def to_openclip(self) -> dict[str, Any]:
        """The same as an OpenCLIP-style dict of plain values, ready for JSON."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": asdict(self.vision),
            "text_cfg": asdict(self.text),
            "crossmodal": self.crossmodal,
            "pool_heads": self.pool_heads,
        }


NAMED_MODELS: dict[str, ModelConfig] = {
    "ViT-B-16": ModelConfig(vision=VisionConfig(patch_size=16)),
    "ViT-B-32": ModelConfig(vision=VisionConfig(patch_size=32)),
}


def named_model(name: str) -> ModelConfig:
    """The architecture published under `name`."""
    if name not in NAMED_MODELS:
        raise UserError(f"model {name!r} is not known: use one of {', '.join(NAMED_MODELS)}")
    return NAMED_MODELS[name]


def _refuse_unknown(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    require(not unknown, f"{where}: {', '.join(unknown)} not supported; known keys: {', '.join(sorted(known))}")


def _whole_numbers(openclip: Mapping[str, Any], key: str, section: type) -> dict[str, int]:
    """The values of one tower, after checking that `section` has these keys and takes these values."""
    values = openclip[key]
    require(isinstance(values, Mapping), f"model: {key!r} must be a dict, not {type(values).__name__}")
    _refuse_unknown(f"model {key}", values, {f.name for f in fields(section)})
    for name, value in values.items():
        require(type(value) is int, f"model: {key}.{name} must be a whole number, not {value!r}")
    return dict(values)
