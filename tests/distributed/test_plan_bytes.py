"""What `cosmos-fast plan` says that ranks send each other, against two ranks of a real training."""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_fast.engine.plan import Layout, count_parameters
from cosmos_fast.engine.plan.traffic import loss_transfers, received_bytes, state_transfers
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.ranks import joined_ranks
from cosmos_fast.utils.topology import topology
from tests.distributed.deepspeed_runs import RankLoader
from tests.ranks import run_ranks
from tests.tiny_run import tiny_config

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.long]  # DeepSpeed is started five times

WORLD, BATCH, MICRO = 2, 4, 2
CASES = [("demo", 0), ("demo", 1), ("demo", 2), ("demo", 3), ("demo_clip", 1)]
SMALL_BYTES = 512  # a flag, a norm, the metrics of a step: no part of the plan

# Operation of torch -> kind of the plan, and which argument is the full tensor.
OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 0),
}


class Counted(TorchDispatchMode):
    """Full bytes and calls of every collective that torch is asked for, by kind; small ones apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = OPERATIONS[func._opname]
            full = args[place]
            size = sum(tensor.nbytes for tensor in (full if isinstance(full, (list, tuple)) else [full]))
            self.bytes["small" if size <= 64 else kind] += size
        return func(*args, **(kwargs or {}))


def settings(recipe: str, stage: int) -> tuple[str, ...]:
    """Two micro-batches a step; stage 3 keeps no small parameter whole."""
    return (
        f"name={recipe}_stage{stage}",
        f"run.batch_size={BATCH}",
        f"run.accumulate_steps={MICRO}",
        f"deepspeed.zero_optimization.stage={stage}",
        *(["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []),
    )


def _train(folder: str) -> None:
    """Three steps of each case; the collectives of the last, when DeepSpeed knows the way through the model."""
    found: dict[Any, Any] = {}
    with joined_ranks("cpu", always=True) as ranks:
        found["topology"] = topology(ranks)
        for recipe, stage in CASES:
            config = tiny_config(Path(folder), *settings(recipe, stage), recipe=recipe)
            loader = RankLoader(config, ranks, 0, None)
            trainer = Trainer(config, loader, plan=plan_run(config), ranks=ranks)
            batches = iter(loader)
            for _ in range(2):
                trainer.train_step([next(batches) for _ in range(MICRO)])
            with Counted() as counted:
                trainer.train_step([next(batches) for _ in range(MICRO)])
            traffic = trainer.gradients.objective.traffic
            found[f"{recipe} {stage}"] = {**counted.bytes, "loss": traffic.total_bytes // 3}
        if ranks.first:
            Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bytes")
    run_ranks(_train, WORLD, str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_the_plan_counts_the_bytes_of_a_real_step(
    recipe: str, stage: int, found: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, *settings(recipe, stage), recipe=recipe)
    chosen = Layout(ranks=WORLD, stage=stage, batch_size=BATCH, accumulate_steps=MICRO, precision="fp32")
    losses = loss_transfers(config, chosen)
    real = dict(found[f"{recipe} {stage}"])
    assert real.pop("loss") == received_bytes(losses, WORLD)
    assert real.pop("small", 0) < SMALL_BYTES
    expected: dict[str, int] = defaultdict(int)
    for transfer in [*losses, *state_transfers(config, count_parameters(config), chosen)]:
        expected[transfer.kind] += transfer.full_bytes
    assert real.keys() == expected.keys()
    found_sizes = {kind: real[kind] / size for kind, size in expected.items()}
    # Flat buffers are filled up to a multiple of the ranks; that of the scales is too small to be told from a flag.
    # Stage 3 gathers a few modules once more than the plan knows.
    tolerance = 0.05 if stage == 3 else 0.02
    assert found_sizes == {kind: pytest.approx(1.0, rel=tolerance) for kind in expected}, (real, expected)


def test_ranks_say_where_they_are(found: dict[str, Any]) -> None:
    host = socket.gethostname()[:64]
    assert found["topology"] == f"2 ranks on {host}, gloo, started by the variables RANK and WORLD_SIZE"
