"""What the plan takes for granted: figures of data sheets, and shares of them that a run is supposed to reach.

None of it was measured here. Each has a name, a unit and a source, and each may be set to another value.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.peak_rates import published_peak

_SHEET = "data sheet"
_LINK = "data sheet, one direction"
_SERVER = "network cards of the vendor's server of eight"
_PCIE_SERVER = "one 100 Gb/s card a server"


@dataclass(frozen=True)
class Sheet:
    """memory_gb: 10^9 bytes. hbm_gb_s: memory's bandwidth. link_gb_s: of one GPU to the others of its server, one
    direction. network_gb_s: of the whole server, one direction."""

    memory_gb: float
    hbm_gb_s: float
    link_gb_s: float
    network_gb_s: float


# NVLink or PCIe by the GPU's sheet; networks are those of DGX servers: 8 cards of 400 Gb/s, 200 (A100) or 100/2 (V100).
SHEETS: dict[str, Sheet] = {
    "B200": Sheet(180, 8000, 900, 400),
    "H200": Sheet(141, 4800, 450, 400),
    "H100": Sheet(80, 3350, 450, 400),
    "H100 PCIe": Sheet(80, 2000, 64, 12.5),
    "H800": Sheet(80, 3350, 200, 400),
    "A100": Sheet(80, 2039, 300, 200),
    "A100 40GB": Sheet(40, 1555, 300, 200),
    "A800": Sheet(80, 2039, 200, 200),
    "V100": Sheet(32, 900, 150, 50),
    "L40S": Sheet(48, 864, 32, 12.5),
    "A40": Sheet(48, 696, 32, 12.5),
    "A10": Sheet(24, 600, 32, 12.5),
    "L4": Sheet(24, 300, 32, 12.5),
    "T4": Sheet(16, 320, 16, 12.5),
    "RTX 4090": Sheet(24, 1008, 32, 12.5),
    "RTX 3090": Sheet(24, 936, 32, 12.5),
}


def _assumed(default: float, unit: str, source: str) -> float:
    return field(default=default, metadata={"unit": unit, "source": source})  # type: ignore[return-value]


def _given(unit: str) -> float:
    return field(metadata={"unit": unit})  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Rates of one GPU and its server, and the shares of them that a run reaches; sources: where each value is from.

    Bandwidths are of one direction. overlap: of a transfer that may run beside computing, the share of that computing
    that it hides under. latency_us: of one collective, for each doubling of the ranks. Caption lengths are means, up
    to EOT; 0 stands for the full context.
    """

    peak_tflops: float = _given("TFLOP/s")
    memory_gb: float = _given("GB a GPU")
    hbm_gb_s: float = _given("GB/s a GPU")
    link_gb_s: float = _given("GB/s a GPU")
    network_gb_s: float = _given("GB/s a server")
    mfu: float = _assumed(0.40, "of peak_tflops", "the bar of this project, not yet measured on any GPU")
    hbm_share: float = _assumed(0.7, "of hbm_gb_s", "assumed, for the optimizer's pass")
    link_share: float = _assumed(0.7, "of link and network", "assumed, for large collectives")
    latency_us: float = _assumed(10.0, "us a doubling of ranks", "assumed, for a collective of no size")
    overlap: float = _assumed(0.5, "of the computing beside it", "assumed")
    reserve_gib: float = _assumed(4.0, "GiB a GPU", "assumed: CUDA context, NCCL buffers, fragments")
    global_caption_tokens: float = _assumed(0.0, "tokens", "0: full contexts, as if no caption were shorter")
    local_caption_tokens: float = _assumed(0.0, "tokens", "0: full contexts, as if no caption were shorter")
    sources: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> list[tuple[str, float, str, str]]:
        """(name, value, unit, source) of each."""
        return [
            (one.name, getattr(self, one.name), one.metadata["unit"], self.sources[one.name])
            for one in fields(self)
            if one.name != "sources"
        ]


# Shares of something; the others are any number above 0, or 0 where nothing divides by it.
_SHARES = ("mfu", "hbm_share", "link_share", "overlap")
_MAY_BE_ZERO = ("overlap", "latency_us", "reserve_gib", "global_caption_tokens", "local_caption_tokens")


def names() -> list[str]:
    """Of all assumptions."""
    return [one.name for one in fields(Assumptions) if one.name != "sources"]


def assume(gpu: str, precision: str, given: Mapping[str, float] | None = None) -> Assumptions:
    """Everything that is taken for granted about a GPU.

    Args:
        gpu: as on its data sheet, in any case: h100, "a100 40gb".
        precision: operands of the products: "bf16", "fp16", "tf32", "fp32" or "fp8".
        given: values that replace those of the tables.

    Raises:
        UserError: a GPU that no table has and whose rates are not given, an unknown name, a value out of range.
    """
    given = dict(given or {})
    for name, value in given.items():
        _check(name, value)
    name = canonical(gpu)
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    peak = published_peak(name, precision)
    if peak is not None:
        values["peak_tflops"] = peak.flops_per_s / 1e12
        sources["peak_tflops"] = f"data sheet: dense {precision}"
    if name in SHEETS:
        sheet = SHEETS[name]
        values |= {one.name: getattr(sheet, one.name) for one in fields(sheet)}
        server = _PCIE_SERVER if sheet.network_gb_s < 50 else _SERVER
        sources |= {"memory_gb": _SHEET, "hbm_gb_s": _SHEET, "link_gb_s": _LINK, "network_gb_s": server}
    for one in fields(Assumptions):
        if "source" in one.metadata:
            sources[one.name] = one.metadata["source"]
    values |= given
    sources |= dict.fromkeys(given, "given")
    _require_known(gpu, name, precision, values)
    return Assumptions(**values, sources=sources)  # type: ignore[arg-type]


def canonical(gpu: str) -> str:
    """The name in the table, where there is one: `a100-80gb` is "A100"."""
    plain = " ".join(gpu.replace("-", " ").replace("_", " ").split())
    by_upper = {name.upper(): name for name in SHEETS}
    upper = plain.upper().removeprefix("NVIDIA ")
    for candidate in (upper, upper.replace(" SXM", ""), upper.replace(" 80GB", "").replace(" SXM", "")):
        if candidate in by_upper:
            return by_upper[candidate]
    return plain


def _require_known(gpu: str, name: str, precision: str, values: Mapping[str, float]) -> None:
    required = [one.name for one in fields(Assumptions) if "source" not in one.metadata and one.name != "sources"]
    missing = [one for one in required if one not in values]
    if not missing:
        return
    if name in SHEETS:
        raise UserError(
            f"{name} has no published rate in {precision}: choose another --precision, or give --assume peak_tflops=…"
        )
    near = difflib.get_close_matches(gpu.upper(), SHEETS, n=1, cutoff=0.0)[0]
    options = " ".join(f"--assume {one}=…" for one in missing)
    raise UserError(f"GPU {gpu!r} is not in the table ({', '.join(SHEETS)}): did you mean {near!r}? Or give {options}")


def _check(name: str, value: float) -> None:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]
        raise UserError(f"unknown assumption {name!r}: did you mean {near!r}?")
    least_ok = value >= 0 if name in _MAY_BE_ZERO else value > 0
    if not (math.isfinite(value) and least_ok):
        raise UserError(
            f"assumption {name} is {value:g}: set it {'to 0 or above' if name in _MAY_BE_ZERO else 'above 0'}"
        )
    if name in _SHARES and value > 1:
        raise UserError(f"assumption {name} is {value:g}: a share lies between 0 and 1")
