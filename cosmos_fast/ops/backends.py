"""Which implementation of an operation runs, and why.

Every operation registers its backends in order of preference. `resolve` is the only place that chooses: `auto` takes
the first backend that is available on this machine and supports these tensors; an explicit request is met or refused
with the reason. `cosmos-fast doctor` prints `table()`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

logger = logging.getLogger(__name__)


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
    passed_over: list[str] = []
    for backend in known:
        if not backend.automatic:
            continue
        objection = backend.why_unavailable() or backend.why_unsupported(*tensors) or _why_not_auto(backend, tensors)
        if objection is None:
            reason = "; ".join([*passed_over, f"{backend.name}: first choice that runs here"])
            _announce(op, backend.name, reason)
            return Resolution(backend, reason)
        passed_over.append(f"{backend.name}: {objection}")
    raise ValueError(f"{op}: no backend takes these tensors ({'; '.join(passed_over)})")


def table() -> list[dict[str, str]]:
    """One row a backend: op, backend, status ("available" or why not), summary."""
    return [
        {
            "op": backend.op,
            "backend": backend.name,
            "status": backend.why_unavailable() or "available",
            "summary": backend.summary,
        }
        for backends in _BACKENDS.values()
        for backend in backends
    ]


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


def _announce(op: str, name: str, reason: str) -> None:
    if (op, name) not in _announced:
        _announced.add((op, name))
        logger.info("%s runs on backend %s (%s)", op, name, reason)
