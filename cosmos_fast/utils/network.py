"""Ranks on several hosts: the interface that reaches the others, and what is said when nothing does any more."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from cosmos_fast.utils.errors import UserError

INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFCONF, _SIZE_OF_IFREQ = 0x8912, 40  # of Linux, 64 bits
# What gloo says where another rank has gone, or no longer answers: most of it with the place in its source, not all.
_LOST = re.compile(
    r"gloo/transport|caused pair closure|closed by peer|reset by peer|Timed out waiting|Read timeout|Connect timeout"
    r"|Socket closed|Pair is not connected|Broken pipe|No route to host|Network is unreachable|Connection timed out"
)
_FAR_AWAY = "192.0.2.1"  # nobody's address (RFC 5737): the way to it is the default route


class LostRanks(UserError):
    """Another rank has ended, hangs, or is cut off: of what happened there this rank knows nothing."""


def choose_interface(meeting: str, port: int, *, one_host: bool) -> None:
    """Set the interface that gloo listens at, where GLOO_SOCKET_IFNAME does not say it yet.

    gloo alone takes the address that this host's own name stands for, which many systems list as one of their loopback:
    then no other host reaches this rank.

    Args:
        meeting, port: where the ranks meet.
        one_host: all ranks are on this one, which needs no name and no network.
    """
    if os.environ.get(INTERFACE) or not sys.platform.startswith("linux"):
        return
    if (found := "lo" if one_host else interface_towards(meeting, port)) is not None:
        os.environ[INTERFACE] = found


def interface_towards(meeting: str, port: int) -> str | None:
    """The name of the interface that reaches a host; None where it cannot be told. Nothing is sent.

    To the host that the ranks meet at its name may be its loopback: there it is the interface of the default route, or
    the only one that has an address.
    """
    names = {own: name for own, name in _addresses() if not _only_here(own)}
    for target in (meeting, _FAR_AWAY):
        if (name := names.get(_source(target, port))) is not None:
            return name
    return next(iter(names.values())) if len(set(names.values())) == 1 else None


def limit_waits(timeout_s: float) -> None:
    """How long collectives wait, in all process groups that there are: libraries make some without asking for how long.

    What torch calls private is the only way to it (from torch 2.2 on).
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@contextmanager
def lost_ranks_explained(rank: int, world_size: int) -> Iterator[None]:
    """A block whose collectives fail with one line where another rank cannot be reached any more.

    Raises:
        LostRanks: from what torch has raised.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        told = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().partition("\n")[0])  # without the line of gloo's source
        raise LostRanks(
            f"rank {rank} of {world_size} on {socket.gethostname()} no longer reaches the others ({told}): one of them "
            "has ended or hangs, see what it says, or the network between them is cut; start all again with --resume. "
            "How long a rank waits is run.collective_timeout_s"
        ) from error


def _only_here(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local


def _source(target: str, port: int) -> str:
    """The address that this host would send from, "" where it has no way there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # to connect it sends nothing
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _addresses() -> Iterator[tuple[str, str]]:
    """(address, name of its interface), of all interfaces that have one."""
    import array
    import fcntl

    space = array.array("B", bytes(_SIZE_OF_IFREQ * 512))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, _SIOCGIFCONF, struct.pack("iL", len(space), space.buffer_info()[0]))
    for start in range(0, struct.unpack("iL", answer)[0], _SIZE_OF_IFREQ):
        entry = space[start : start + _SIZE_OF_IFREQ].tobytes()
        name = entry[:16].split(b"\0")[0].decode().partition(":")[0]  # eth0:1 is a second address of eth0
        yield socket.inet_ntoa(entry[20:24]), name
    listed = Path("/proc/net/if_inet6")
    for line in listed.read_text().splitlines() if listed.exists() else ():
        digits, *_, name = line.split()
        yield str(ipaddress.ip_address(bytes.fromhex(digits))), name
