"""Which implementation of an operation runs, and why.

Every operation registers its backends in order of preference. `resolve` is the only place that chooses: `auto` takes
the first backend that is available on this machine and supports these tensors; an explicit request is met or refused
with the reason. `cosmos-fast doctor` prints `table()`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

logger = logging.getLogger(__name__)


def _nothing_against(*_: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    `why_unavailable()` tells why it cannot run on this machine, `why_unsupported(*tensors)` why it cannot take these
    tensors; both return None when nothing is in the way. `summary` is for people: what it does, where it pays.
    """

    op: str
    name: str
    run: Callable
    summary: str
    why_unavailable: Callable[[], str | None] = _nothing_against
    why_unsupported: Callable[..., str | None] = _nothing_against
    automatic: bool = True


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
        objection = backend.why_unavailable() or backend.why_unsupported(*tensors)
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


def _announce(op: str, name: str, reason: str) -> None:
    if (op, name) not in _announced:
        _announced.add((op, name))
        logger.info("%s runs on backend %s (%s)", op, name, reason)
