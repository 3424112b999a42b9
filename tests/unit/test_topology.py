"""Where ranks are, in words."""

from __future__ import annotations

from cosmos_fast.utils.ranks import Ranks
from cosmos_fast.utils.topology import describe_hosts, launcher, topology


def test_topology_in_words() -> None:
    assert topology(Ranks()) == "1 rank"
    assert describe_hosts(["a", "a"]) == "2 ranks on a"
    assert describe_hosts(["a", "a", "b"]) == "3 ranks on 2 hosts (a: 2, b: 1)"
    assert describe_hosts([*"abcdef"]) == "6 ranks on 6 hosts (a: 1, b: 1, c: 1, …, f: 1)"
    assert launcher({"TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "0"}) == "torchrun"
    assert launcher({"CROSS_RANK": "0"}) == "deepspeed"
    assert launcher({"SLURM_PROCID": "0"}) == "srun"
    assert launcher({}) == "the variables RANK and WORLD_SIZE"
