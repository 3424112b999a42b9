"""What `cosmos-fast plan` predicts for the ranks of this machine, from rates that were measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.rank_steps import Case
from cosmos_fast.engine.plan import Assumptions, Forecast, Layout, assume, forecast

# Of the assumptions: rates are measured on ranks at work, so nothing is taken off; gloo hides nothing beside computing.
FIXED = {"hbm_share": 1.0, "link_share": 1.0, "overlap": 0.0, "reserve_gib": 0.0, "memory_gb": 16.0}
ALONE = {"link_gb_s": 1.0, "latency_us": 0.0}  # of a run that sends nothing


def predicted(
    case: Case, world: int, batch: int, rates: Mapping[str, float], mfu: float, more: Sequence[str] = ()
) -> Forecast:
    """A step of `world` ranks. rates: as `rank_steps.rates` gives them. mfu: share of the products' rate. more:
    overrides of the configuration."""
    layout = Layout(ranks=world, stage=case.stage or 0, batch_size=batch, precision="fp32")
    return forecast(case.config(batch, "", *more), layout, _assumed(rates, mfu), gpus_per_node=world)


def fitted_mfu(step_ms: float, batch: int, rates: Mapping[str, float], more: Sequence[str] = ()) -> float:
    """The share at which the prediction for one process without DeepSpeed is what was measured."""
    whole = predicted(Case(None), 1, batch, rates, 1.0, more)
    optimizer_ms = whole.compute_ms["optimizer"]
    return min(1.0, (whole.step_ms - optimizer_ms) / max(step_ms - optimizer_ms, 1e-3))


def _assumed(rates: Mapping[str, float], mfu: float) -> Assumptions:
    given = {**FIXED, **ALONE, **rates, "mfu": mfu}
    return assume("this machine", "fp32", {**given, "network_gb_s": given["link_gb_s"]})
