"""The numbers of some steps, over all ranks: means and sums, and where there are several, who is slow and who waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosmos_fast.utils.memory import MIB


@dataclass(frozen=True)
class RankTimes:
    """What one rank has counted over some steps. samples, flops: its own share; flops_done: of the whole run so far.
    step_ms holds communication_ms, which is what collectives took, waiting for other ranks included."""

    samples: int
    data_ms: float
    step_ms: float
    communication_ms: float
    peak_bytes: int
    flops: float
    flops_done: float
    bad_samples: int

    @property
    def own_ms(self) -> float:
        """Of work that waits for no other rank: loading, computing, updating."""
        return max(self.data_ms + self.step_ms - self.communication_ms, 1e-6)


class RankReport:
    """Of ranks 0, 1, ... over so many steps."""

    def __init__(self, ranks: Sequence[RankTimes], steps: int) -> None:
        self._ranks = ranks
        self._steps = steps

    def numbers(self, peak_flops_per_s: float | None = None) -> dict[str, float]:
        """What a metrics row has of it, docs/monitoring.md explains each. peak_flops_per_s: of one rank's hardware."""
        step_ms, data_ms = self._mean("step_ms"), self._mean("data_ms")
        wall_ms = max(data_ms + step_ms, 1e-6)
        found: dict[str, float] = {
            "step_ms": step_ms / self._steps,
            "data_ms": data_ms / self._steps,
            "samples_per_s": sum(rank.samples for rank in self._ranks) / wall_ms * 1e3,
            "data_stall_pct": 100.0 * data_ms / wall_ms,
        }
        if len(self._ranks) > 1:
            found |= self._among_ranks()
        if peak_flops_per_s is not None:
            found["mfu_pct"] = 100.0 * self._mean("flops") / (peak_flops_per_s * wall_ms / 1e3)
        found["peak_memory_mib"] = max(rank.peak_bytes for rank in self._ranks) / MIB
        found["bad_samples"] = sum(rank.bad_samples for rank in self._ranks)
        found["flops"] = sum(rank.flops_done for rank in self._ranks)
        return found

    def _among_ranks(self) -> dict[str, float]:
        """A collective costs the rank that comes last its transfer only: what it takes elsewhere beyond is waiting."""
        ranks, steps = self._ranks, self._steps
        communication = [rank.communication_ms for rank in ranks]
        alone = [1e3 * rank.samples / rank.own_ms for rank in ranks]
        slowest_loader = _place_of_largest([rank.data_ms for rank in ranks])
        memory = [rank.peak_bytes for rank in ranks]
        return {
            "communication_ms": self._mean("communication_ms") / steps,
            "wait_ms": (self._mean("communication_ms") - min(communication)) / steps,
            "slowest_rank": _place_of_largest([rank.own_ms for rank in ranks]),
            "samples_per_s_slowest_rank": min(alone),
            "samples_per_s_fastest_rank": max(alone),
            "data_ms_slowest_rank": ranks[slowest_loader].data_ms / steps,
            "data_slowest_rank": slowest_loader,
            "peak_memory_rank": _place_of_largest(memory),
            "least_peak_memory_mib": min(memory) / MIB,
        }

    def _mean(self, name: str) -> float:
        return sum(getattr(rank, name) for rank in self._ranks) / len(self._ranks)


def described(row: Mapping[str, Any]) -> str:
    """The part of the progress line that several ranks add."""
    if "communication_ms" not in row:
        return ""
    share = 100.0 / max(row["step_ms"] + row["data_ms"], 1e-6)
    return (
        f"communication {share * row['communication_ms']:.0f} % (waiting {share * row['wait_ms']:.0f} %, "
        f"rank {row['slowest_rank']} slowest)  "
    )


def _place_of_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])
