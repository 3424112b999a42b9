"""What was measured on hardware: which backend is fastest where, and which backends have passed their tests there.

`measured.json` is committed; `python -m benchmarks.measured` fills it from the results of a GPU check:

    {"order": [{"op": "multiview_infonce", "device": "NVIDIA H200", "up_to_elements": null, "backends": ["cuda", ...],
                "commit": "0123456789ab"}],
     "ran": [{"op": "multiview_infonce", "backend": "triton", "device": "NVIDIA H200", "commit": "0123456789ab"}]}

An entry holds for calls whose tensors have at most `up_to_elements` elements together (null: for any size).
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "measured.json"


class Order(NamedTuple):
    op: str
    device: str
    up_to_elements: float
    backends: tuple[str, ...]


class Ran(NamedTuple):
    op: str
    backend: str
    device: str
    commit: str


class Measured(NamedTuple):
    """`order` is sorted by size, so that the first entry that is large enough holds."""

    order: tuple[Order, ...]
    ran: tuple[Ran, ...]


@functools.cache
def load() -> Measured:
    """The committed table."""
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    orders = [
        Order(
            row["op"],
            row["device"],
            math.inf if row["up_to_elements"] is None else row["up_to_elements"],
            tuple(row["backends"]),
        )
        for row in data["order"]
    ]
    ran = [Ran(row["op"], row["backend"], row["device"], row["commit"]) for row in data["ran"]]
    return Measured(tuple(sorted(orders, key=lambda order: order.up_to_elements)), tuple(ran))


def entries(op: str, device: str) -> list[Order]:
    """What is known of this operation on this device (a GPU's name), smallest sizes first."""
    return [order for order in load().order if (order.op, order.device) == (op, device)]


def devices_of(op: str, backend: str) -> list[str]:
    """Devices on which the backend's tests have passed."""
    return sorted({ran.device for ran in load().ran if (ran.op, ran.backend) == (op, backend)})
