"""Hosts for tests: network namespaces of this machine, joined by a cable that can be cut.

Each host has a name, an address, an /etc/hosts with the names of all, and interfaces of its own, so that every port is
free. A host lives as long as the process that holds it, which ends with its parent: nothing stays behind.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_SPACES = ("--net", "--uts", "--mount")
_HOLD = """
set -e
ip link set lo up
hostname "$0"
mount --bind "$1" /etc/hosts
echo ready
exec cat
"""


@dataclass(frozen=True)
class Host:
    """name: its own. address: of its interface `cable0`. pid: of the process that holds it."""

    name: str
    address: str
    pid: int

    def inside(self, command: list[str]) -> list[str]:
        """The command that runs `command` there, in the folder that it is started in."""
        return ["nsenter", f"--target={self.pid}", *_SPACES, f"--wd={os.getcwd()}", "--", *command]

    def start(self, command: list[str], **how: Any) -> subprocess.Popen[str]:
        """subprocess.Popen of a command there."""
        return subprocess.Popen(self.inside(command), text=True, **how)

    def run(self, *command: str) -> str:
        """What a short command there prints."""
        return subprocess.run(self.inside([*command]), check=True, capture_output=True, text=True).stdout

    def enter(self) -> None:
        """Take this process there, for good; one that has no other threads."""
        files = [os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "mnt")]
        for file in files:
            if ctypes.CDLL(None, use_errno=True).setns(file, 0):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")
            os.close(file)

    def cut(self) -> None:
        """What is sent from here on is lost on the way, in both directions; nobody is told."""
        self.run("ip", "link", "set", "cable0", "down")

    def heal(self) -> None:
        """The cable is whole again."""
        self.run("ip", "link", "set", "cable0", "up")


@contextmanager
def two_hosts(folder: Path, own_name_is_local: bool = True) -> Iterator[tuple[Host, Host]]:
    """Hosts `host-a` and `host-b` on one cable; skips the test where this process may not make them.

    own_name_is_local: each host's own name stands for an address of its loopback, as on a Debian. folder: for files.
    """
    addresses = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
    holders: list[subprocess.Popen[str]] = []
    try:
        for own in addresses:
            listed = addresses | ({own: "127.0.1.1"} if own_name_is_local else {})
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in listed.items())]
            (folder / f"hosts.{own}").write_text("".join(f"{line}\n" for line in lines))
            holders.append(_hold(own, folder / f"hosts.{own}"))
        hosts = [Host(*each, held.pid) for each, held in zip(addresses.items(), holders, strict=True)]
        cable = ["type", "veth", "peer", "name", "cable0", "netns", str(hosts[1].pid)]
        hosts[0].run("ip", "link", "add", "cable0", *cable)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable0")
            host.heal()
        yield hosts[0], hosts[1]
    finally:
        for holder in holders:
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait()


def _hold(name: str, hosts_file: Path) -> subprocess.Popen[str]:
    if missing := [program for program in ("unshare", "nsenter", "ip", "mount") if shutil.which(program) is None]:
        pytest.skip(f"hosts are network namespaces: {missing[0]} is not installed")
    command = ["unshare", *_SPACES, "--", "sh", "-c", _HOLD, name, str(hosts_file)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        assert holder.stderr is not None
        pytest.skip(f"hosts are network namespaces, which may not be made here: {holder.communicate()[1].strip()}")
    return holder
