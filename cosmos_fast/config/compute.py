"""How the arithmetic of a run is carried out; none of it changes what is computed, beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from cosmos_fast.config.checks import require, require_choice

ATTENTION = ("auto", "sdpa", "native", "varlen", "flash", "xformers", "triton")
CHECKPOINTS = ("none", "mlp", "blocks")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Memory and speed of the towers and of the optimizer.

    attention: backend of the towers' self-attention. compile: the parts of a block around attention through
    torch.compile. checkpoint_activations: what the backward pass makes anew instead of keeping it: "mlp" the second
    half of each block, "blocks" whole blocks. cuda_graphs: the vision tower as a CUDA graph. layer_norm, optimizer:
    whose implementation; the optimizer's state moves between them. linear: "fp8" multiplies the blocks' linear layers
    in 8 bits, through fp8_backend ("te" is TransformerEngine).
    """

    attention: Literal["auto", "sdpa", "native", "varlen", "flash", "xformers", "triton"] = "auto"
    compile: bool = False
    checkpoint_activations: Literal["none", "mlp", "blocks"] = "none"
    cuda_graphs: bool = False
    layer_norm: Literal["torch", "apex", "triton"] = "torch"
    optimizer: Literal["fused", "torch", "apex"] = "fused"
    linear: Literal["plain", "fp8"] = "plain"
    fp8_backend: Literal["auto", "torchao", "te"] = "auto"

    def __post_init__(self) -> None:
        require_choice("compute.attention", self.attention, ATTENTION)
        require_choice("compute.checkpoint_activations", self.checkpoint_activations, CHECKPOINTS)
        require_choice("compute.layer_norm", self.layer_norm, ("torch", "apex", "triton"))
        require_choice("compute.optimizer", self.optimizer, ("fused", "torch", "apex"))
        require_choice("compute.linear", self.linear, ("plain", "fp8"))
        require_choice("compute.fp8_backend", self.fp8_backend, ("auto", "torchao", "te"))
        require(
            not (self.compile and self.layer_norm != "torch"),
            "compute.compile=true makes layer norms of its own: set compute.layer_norm=torch, or compute.compile=false",
        )
        require(
            not (self.layer_norm == "triton" and self.checkpoint_activations == "mlp"),
            "compute.checkpoint_activations=mlp makes the norm that compute.layer_norm=triton fuses anew: set "
            "compute.layer_norm=torch, or compute.checkpoint_activations to none or blocks",
        )
        require(
            self.linear == "fp8" or self.fp8_backend == "auto",
            f"compute.fp8_backend is {self.fp8_backend!r}, but compute.linear is 'plain': set compute.linear=fp8",
        )

    def changed(self) -> dict[str, str | bool]:
        """What differs from the defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def changes(self) -> str:
        """The same in words; empty for nothing."""
        return ", ".join(f"{name}={value}" for name, value in self.changed().items())
