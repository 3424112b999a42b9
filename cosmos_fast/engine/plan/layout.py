"""How a global batch lies on ranks."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """ranks: one a GPU. stage: of ZeRO. batch_size: samples a rank and micro-batch. accumulate_steps: micro-batches an
    optimizer step. precision: "fp32", "bf16" or "fp16". all_negatives: the micro-batches of a step share one loss."""

    ranks: int
    stage: int
    batch_size: int
    accumulate_steps: int = 1
    precision: str = "bf16"
    all_negatives: bool = False

    @property
    def rank_samples(self) -> int:
        """Samples of an optimizer step on one rank."""
        return self.batch_size * self.accumulate_steps

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        return self.rank_samples * self.ranks

    @property
    def losses(self) -> int:
        """Losses that an optimizer step computes."""
        return 1 if self.all_negatives else self.accumulate_steps

    @property
    def loss_batch(self) -> int:
        """Samples that one loss holds against each other, over all ranks."""
        return self.global_batch // self.losses

    @property
    def value_bytes(self) -> int:
        """Of one number in the working copies, activations and operands."""
        return 4 if self.precision == "fp32" else 2
