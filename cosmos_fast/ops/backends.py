"""Which implementation of an operation runs, and why.

Every operation registers its backends in order of preference. `resolve` is the only place that chooses, and does
nothing else: `auto` takes the first backend that is available on this machine and supports these tensors, in measured
order where `measured.json` knows this GPU, else in order of registration; an explicit request is met or refused with
the reason. Operations call `stages_for` or `choose`, which also log each new choice once. `cosmos-fast doctor` prints
`table()`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_fast.ops import measured
from cosmos_kernels import triton_support

logger = logging.getLogger(__name__)

GPU_BACKENDS = ("triton", "cuda")


def _nothing_against(*_: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    `run` is what runs: a function, or a namespace (a module, say) with the operation's stage functions. Where importing
    it costs something or needs an optional package, leave `run` out and give `load`, which returns it at first use:
    `load=partial(import_module, "cosmos_kernels.infonce_triton")`. Callers take `stages`, which serves both.

    `why_unavailable()` tells why it cannot run on this machine, `why_unsupported(*tensors)` why it cannot take these
    tensors; both return None when nothing is in the way, and neither may import what `load` is there to postpone.
    `summary` is for people: what it does, where it pays. `automatic=False`: only on explicit request.
    """

    op: str
    name: str
    run: Any = None
    summary: str = ""
    why_unavailable: Callable[[], str | None] = _nothing_against
    why_unsupported: Callable[..., str | None] = _nothing_against
    automatic: bool = True
    load: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        assert (self.run is None) != (self.load is None), f"{self.op}: {self.name}: give either run or load"

    @property
    def stages(self) -> Any:
        """What runs, imported at first use."""
        return self.run if self.load is None else _loaded(self.load)


@functools.cache
def _loaded(load: Callable[[], Any]) -> Any:
    return load()


class Resolution(NamedTuple):
    backend: Backend
    reason: str


_BACKENDS: dict[str, list[Backend]] = {}
_announced: set[tuple[str, str]] = set()


def register(*backends: Backend) -> None:
    """Add backends, most preferred first. A name may be registered once per operation."""
    for backend in backends:
        known = _BACKENDS.setdefault(backend.op, [])
        assert backend.name not in {other.name for other in known}, f"{backend.op}: {backend.name} registered twice"
        known.append(backend)


def resolve(op: str, request: str, *tensors: Tensor) -> Resolution:
    """Choose the backend of `op` for these tensors.

    Args:
        op: name of the operation.
        request: "auto" or the name of a backend.
        tensors: the operation's tensor arguments; device, dtype and shape may rule a backend out.

    Returns:
        The backend and the reason for it, in words.

    Raises:
        ValueError: an explicit request that is unknown or cannot be met.
    """
    known = _BACKENDS[op]
    if request != "auto":
        return _resolve_explicit(op, request, known, tensors)
    candidates, why = _in_order(op, known, tensors)
    passed_over: list[str] = []
    for backend in candidates:
        objection = backend.why_unavailable() or backend.why_unsupported(*tensors) or _why_not_auto(backend, tensors)
        if objection is None:
            return Resolution(backend, "; ".join([*passed_over, f"{backend.name}: {why}"]))
        passed_over.append(f"{backend.name}: {objection}")
    raise ValueError(f"{op}: no backend takes these tensors ({'; '.join(passed_over)})")


def choose(op: str, request: str, *tensors: Tensor) -> Backend:
    """`resolve(...).backend`; logs the choice where it is a new one."""
    backend, reason = resolve(op, request, *tensors)
    if (op, backend.name) not in _announced:
        _announced.add((op, backend.name))
        logger.info("%s runs on backend %s (%s)", op, backend.name, reason)
    return backend


def stages_for(op: str, request: str, *tensors: Tensor) -> Any:
    """What runs `op` for these tensors; logs the choice where it is a new one."""
    return choose(op, request, *tensors).stages


def why_triton_cannot_compile() -> str | None:
    """What Triton misses to build kernels, those that torch.compile makes for a GPU too; None for nothing."""
    return triton_support.why_no_compiler()


def table() -> list[dict[str, str]]:
    """One row a backend: op, backend, status ("available" or why not), hardware (where it has been run), summary."""
    return [
        {
            "op": backend.op,
            "backend": backend.name,
            "status": backend.why_unavailable() or "available",
            "hardware": _hardware(backend),
            "summary": backend.summary,
        }
        for backends in _BACKENDS.values()
        for backend in backends
    ]


def _hardware(backend: Backend) -> str:
    """Empty for backends that run everywhere; GPU code is either tested on named devices or only compiled."""
    if backend.name not in GPU_BACKENDS:
        return ""
    devices = measured.devices_of(backend.op, backend.name)
    return f"tested on {', '.join(devices)}" if devices else "compiled, not yet run on hardware"


def _in_order(op: str, known: list[Backend], tensors: tuple[Tensor, ...]) -> tuple[list[Backend], str]:
    """Backends that `auto` may take, best first, and why the first one is best."""
    automatic = [backend for backend in known if backend.automatic]
    if not tensors or tensors[0].device.type != "cuda":
        return automatic, "first choice that runs here"
    device = torch.cuda.get_device_name(tensors[0].device)
    orders = measured.entries(op, device)
    elements = sum(tensor.numel() for tensor in tensors) if orders else 0
    names = next((order.backends for order in orders if elements <= order.up_to_elements), None)
    if names is None:
        return automatic, "first choice that runs here"
    ranks = {name: rank for rank, name in enumerate(names)}
    # A GPU backend that waited to be measured (automatic=False) is one to choose now; the oracle never is.
    candidates = [other for other in known if other.automatic or (other.name in GPU_BACKENDS and other.name in ranks)]
    by_speed = sorted(candidates, key=lambda backend: ranks.get(backend.name, len(ranks)))  # the rest as registered
    return by_speed, f"the fastest that runs here, as measured on {device} for tensors of this size"


def _resolve_explicit(op: str, request: str, known: list[Backend], tensors: tuple[Tensor, ...]) -> Resolution:
    chosen = next((backend for backend in known if backend.name == request), None)
    if chosen is None:
        names = ", ".join(["auto", *(backend.name for backend in known)])
        raise ValueError(f"{op}: unknown backend {request!r}; choose one of {names}")
    objection = chosen.why_unavailable() or chosen.why_unsupported(*tensors)
    if objection is not None:
        raise ValueError(f"{op}: backend {request!r} was asked for but cannot run: {objection}")
    return Resolution(chosen, "asked for by name")


def _why_not_auto(backend: Backend, tensors: tuple[Tensor, ...]) -> str | None:
    """Triton takes CPU tensors in its interpreter only, which is for tests: never chosen by itself."""
    interpreted = backend.name == "triton" and any(tensor.device.type == "cpu" for tensor in tensors)
    return "Triton's interpreter runs on request only" if interpreted else None
