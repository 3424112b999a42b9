"""Ranks on two hosts: how they find each other, and what becomes of them when the cable between them is cut."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.network import interface_towards, limit_waits
from cosmos_fast.utils.ranks import joined_ranks
from cosmos_fast.utils.topology import topology
from tests.hosts import Host, two_hosts
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def enter_host(hosts: tuple[Host, Host]) -> None:
    """Take this rank to the host of its number, with the variables that a launcher of several hosts sets."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    os.environ |= {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": "29500", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    hosts[int(os.environ["RANK"])].enter()


def _meet_and_part(hosts: tuple[Host, Host], folder: str) -> None:
    enter_host(hosts)
    found: dict[str, object] = {}
    try:
        with joined_ranks("cpu", timeout_s=300.0) as ranks:
            found["interfaces"] = [os.environ["GLOO_SOCKET_IFNAME"], interface_towards(hosts[1 - ranks.rank].name, 1)]
            found["where"] = topology(ranks)
            found["mean"] = ranks.mean({"rank": ranks.rank})
            of_a_library = dist.new_group()
            if ranks.rank == 1:
                subprocess.run(["ip", "link", "set", "cable0", "down"], check=True)
                Path(folder, "cut").touch()
            while not Path(folder, "cut").exists():  # nobody gives up, and hangs up, before it is cut
                time.sleep(0.01)
            limit_waits(1.0)  # however late the other rank is: none of them gets an answer from here on
            dist.barrier(of_a_library)
    except UserError as error:
        found["error"] = str(error)
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def test_ranks_meet_over_the_cable_and_end_with_one_line_when_it_is_cut(tmp_path: Path) -> None:
    """The host's own name is one of its loopback, as on many systems: gloo by itself would listen there."""
    with two_hosts(tmp_path) as hosts:
        run_ranks(_meet_and_part, 2, hosts, str(tmp_path))
    for rank, name in enumerate(("host-a", "host-b")):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["interfaces"] == ["cable0", "cable0"]
        assert found["where"].startswith("2 ranks on 2 hosts (host-a: 1, host-b: 1), gloo")
        assert found["mean"] == {"rank": 0.5}
        assert found["error"].startswith(f"rank {rank} of 2 on {name} no longer reaches the others (Timed out")
        assert "\n" not in found["error"]
