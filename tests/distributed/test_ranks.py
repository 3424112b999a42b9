"""Who is who among the processes of a run, and what they tell each other."""

from __future__ import annotations

import atexit
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cosmos_fast.utils import group_end
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks, _with_groups, device_of_rank, joined_ranks, place_of_environment
from tests.ranks import TIMEOUT_S, environment, run_ranks

TORCHRUN = environment(rank=1, world=4, port=29500)
WORLD = 3


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, environment(0, 1, 1)])
def test_without_a_launcher_or_with_one_process_there_is_one_rank(environ: dict[str, str]) -> None:
    assert place_of_environment(environ) == Ranks(0, 1, 0, 1)


def test_the_place_is_what_the_launcher_says() -> None:
    assert place_of_environment(TORCHRUN) == Ranks(1, 4, 1, 4)
    deepspeed = TORCHRUN | {"RANK": "3", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": ""}
    assert place_of_environment(deepspeed) == Ranks(3, 4, 1, 2)
    assert place_of_environment(TORCHRUN | {"LOCAL_WORLD_SIZE": ""}) == Ranks(1, 4, 1, 0)
    assert not place_of_environment(TORCHRUN).first
    assert place_of_environment(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).first


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused_by_name(missing: str) -> None:
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError, match=f"but not {missing}: start the run with torchrun or deepspeed") as refused:
        place_of_environment(environ)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "4", "RANK is 4 and WORLD_SIZE 4: ranks go from 0"),
        ("RANK", "-1", "RANK is -1 and WORLD_SIZE 4"),
        ("WORLD_SIZE", "four", "WORLD_SIZE is 'four', not a number"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000: a port is a number from 1 to 65535"),
        ("LOCAL_RANK", "3", "LOCAL_RANK is 3, which cannot be on a host of 4 ranks"),
        ("LOCAL_WORLD_SIZE", "1", "LOCAL_RANK is 1, which cannot be on a host of 1 ranks"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        place_of_environment(TORCHRUN | {name: value})


@pytest.mark.parametrize(("local_rank", "expected"), [(0, "cuda:0"), (2, "cuda:2")])
def test_every_rank_of_a_host_has_a_gpu_of_its_own(local_rank: int, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    place = Ranks(8 + local_rank, 16, local_rank, 8)
    assert device_of_rank("auto", place) == device_of_rank("cuda", place) == expected
    assert device_of_rank("cpu", place) == "cpu"
    assert device_of_rank("cuda:3", Ranks()) == "cuda:3"
    with pytest.raises(UserError, match="'cuda:1', one GPU for 16 ranks: use cuda or auto"):
        device_of_rank("cuda:1", place)
    with pytest.raises(UserError, match="LOCAL_RANK is 4, but torch sees 4 GPUs: start 4 ranks a host"):
        device_of_rank("auto", Ranks(4, 8, 4, 8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a scheduler that shows a task its own GPU only
    assert device_of_rank("auto", place) == "cuda:0"


def test_one_process_needs_no_group_and_tells_itself() -> None:
    with joined_ranks("cpu") as ranks:
        assert not dist.is_initialized()
        assert ranks == Ranks()
        assert ranks.mean({"a": 2.0}) == {"a": 2.0}
        assert ranks.spread({"a": torch.tensor(2.0)}) == {"a": (2.0, 2.0)}
        assert ranks.any(True)
        assert not ranks.any(False)
        assert ranks.on_first(lambda: [1]) == [1]
        with pytest.raises(UserError, match=r"^no data$"), ranks.together():
            raise UserError("no data")
        ranks.barrier()
    with joined_ranks("cpu", always=True) as ranks:
        assert dist.get_world_size() == 1
        assert ranks.group is None
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("gpus", "fails", "is_shut_down"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_rank_that_fails_does_not_wait_for_others(
    gpus: bool, fails: bool, is_shut_down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which NCCL's shutdown would do. The process has so many seconds from its exit handlers on."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    ended: list[str] = []
    left_to_exit: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("cosmos_fast.utils.ranks._meet", lambda *_: None)
    monkeypatch.setattr("cosmos_fast.utils.ranks._with_groups", lambda place, *_: place)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("shut down"))
    monkeypatch.setattr(atexit, "register", left_to_exit.append)
    if fails:
        with pytest.raises(UserError, match=r"^no data$"), joined_ranks():
            raise UserError("no data")
    else:
        with joined_ranks():
            pass
    assert ended == ["shut down"] * is_shut_down
    assert left_to_exit == [group_end.end_in_time] * (not is_shut_down)


def _hang_at_the_end(rank: int) -> None:
    group_end.END_S = 1
    group_end.end_in_time()
    time.sleep(TIMEOUT_S)


def test_a_process_whose_abort_hangs_ends_all_the_same() -> None:
    with pytest.raises(mp.ProcessExitedException, match="SIGALRM"):
        mp.start_processes(_hang_at_the_end, nprocs=1, start_method="forkserver")


def _tell(folder: str) -> None:
    found: dict[str, Any] = {}
    with joined_ranks("cpu", timeout_s=300.0) as ranks:
        rank = ranks.rank
        found["place"] = [ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, str(ranks.device)]
        found["backend"] = dist.get_backend(ranks.group)
        found["mean"] = ranks.mean({"loss": torch.tensor(float(rank)), "large": 2.0**40 + rank})
        found["spread"] = ranks.spread({"ms": 10.0 * rank, "below": -1.0 - rank})
        found["any"] = [ranks.any(rank == 1), ranks.any(False)]
        found["equal"] = [ranks.all_equal("same"), ranks.all_equal(f"config of {rank // 2}")]
        found["told"] = ranks.on_first(lambda: {"step": 7, "folder": "läufe", "by": rank})
        ranks.barrier()

        def refuse() -> None:
            raise UserError("the folder is in use")

        def fail(number: int) -> None:
            with ranks.together():
                if rank >= number:
                    raise (UserError if rank == 1 else KeyError)(f"rank {rank} has no data\nsecond line")

        for name, act in (("first", lambda: ranks.on_first(refuse)), ("together", lambda: fail(1))):
            try:
                act()
            except Exception as error:
                found[name] = [type(error).__name__, str(error)]
        fail(WORLD)
        found["after"] = ranks.mean({"still": 1.0})
        on_gpus = _with_groups(ranks, torch.device("cuda:0"), 300.0)  # they talk by the host, in a group of their own
        found["control"] = [each.control is ranks.group for each in (ranks, on_gpus)]
        found["by the host"] = [dist.get_backend(on_gpus.control), on_gpus.mean({"rank": rank}), on_gpus.any(rank == 2)]
    found["ended"] = not dist.is_initialized()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def _wait_alone(folder: str) -> None:
    if os.environ["RANK"] == "1":
        try:
            with joined_ranks("cpu", timeout_s=0.2):
                pass
        except UserError as error:
            Path(folder, "alone.txt").write_text(str(error))


@pytest.mark.slow
def test_ranks_agree_on_numbers_texts_and_failures(tmp_path: Path) -> None:
    run_ranks(_tell, WORLD, str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for rank, found in enumerate(ranks):
        assert found["place"] == [rank, WORLD, rank, WORLD, "cpu"]
        assert found["backend"] == "gloo"
        assert found["mean"] == {"loss": 1.0, "large": 2.0**40 + 1}
        assert found["spread"] == {"ms": [0.0, 20.0], "below": [-3.0, -1.0]}
        assert found["any"] == [True, False]
        assert found["equal"] == [True, False]
        assert found["told"] == {"step": 7, "folder": "läufe", "by": 0}
        assert found["first"] == ["UserError", "the folder is in use" if rank == 0 else "rank 0: the folder is in use"]
        assert found["after"] == {"still": 1.0}
        assert found["control"] == [True, False]
        assert found["by the host"] == ["gloo", {"rank": 1.0}, True]
        assert found["ended"]
    assert ranks[0]["together"] == ["UserError", "rank 1: rank 1 has no data"]
    assert ranks[1]["together"] == ["UserError", "rank 1 has no data\nsecond line"]
    assert ranks[2]["together"][0] == "KeyError"


@pytest.mark.slow
def test_a_rank_that_nobody_meets_says_so_in_one_line(tmp_path: Path) -> None:
    run_ranks(_wait_alone, 2, str(tmp_path))
    message = (tmp_path / "alone.txt").read_text()
    assert message.startswith("rank 1 of 2 cannot meet the others at 127.0.0.1:")
    assert "\n" not in message
