"""How much memory there is, and what is said when it runs out."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.checkpoint import list_checkpoints
from cosmos_fast.engine.hooks import StepOutcome
from cosmos_fast.engine.out_of_memory import is_out_of_memory, out_of_memory_explained
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils import memory_limits
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import flat, make_trainer, tiny_config

GIB = 2**30
CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:  8388608 kB\nMemFree: 100 kB\nMemAvailable: 6291456 kB\n"}


@pytest.mark.parametrize(
    ("files", "total_gib", "free_gib"),
    [
        ({}, 8, 6),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 8, 6),
        (
            {
                "proc/self/cgroup": "0::/box/inner\n",
                "sys/fs/cgroup/box/inner/memory.max": "max\n",
                "sys/fs/cgroup/box/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            *(4, 2),
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/not/seen/inside\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 7\ntotal_inactive_file 0\n",
            },
            *(2, 1),
        ),
    ],
)
def test_limits_of_machine_and_control_groups(
    files: dict[str, str], total_gib: int, free_gib: int, tmp_path: Path, monkeypatch
) -> None:
    write(tmp_path, MEMINFO | files)
    monkeypatch.setattr(memory_limits, "ROOT", tmp_path)
    assert memory_limits.memory_limits(CPU) == (total_gib * GIB, free_gib * GIB)


def test_limits_of_this_machine() -> None:
    total, free = memory_limits.memory_limits(CPU)
    assert 0 < free <= total < 2**50


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_one_line(error: Exception, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.accumulate_steps=2", "run.negatives=all")
    with pytest.raises(UserError) as caught, out_of_memory_explained(config):
        raise error
    message = str(caught.value)
    assert "\n" not in message
    assert "run.batch_size=2 run.accumulate_steps=4 run.negatives=all, the same loss" in message
    assert "compute.checkpoint_activations=blocks" in message
    assert "--find-batch-size" in message


def test_a_smaller_batch_that_is_proposed_keeps_the_samples_of_a_step(tmp_path: Path) -> None:
    odd = tiny_config(tmp_path, "run.batch_size=25")
    with pytest.raises(UserError, match=r"run\.batch_size=5 run\.accumulate_steps=5 "), out_of_memory_explained(odd):
        raise MemoryError


def test_other_errors_pass_through(tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_explained(tiny_config(tmp_path)):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("settings", [(), ("run.accumulate_steps=2", "run.negatives=all")])
def test_no_tensor_outlives_its_step(settings: tuple[str, ...], tmp_path: Path) -> None:
    """Captions of other lengths in every step: a cache by shape, or a graph that is kept, would show."""

    def poison(batch: Batch) -> None:
        context, eot = batch.texts.shape[2], trainer.config.model.text.vocab_size - 1
        generator = torch.Generator().manual_seed(batch.position)
        lengths = torch.randint(1, context, (*batch.texts.shape[:2], 1), generator=generator)
        batch.texts.scatter_(2, lengths, eot)

    alive: list[int] = []

    class Count:
        def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
            if trainer.state.step not in (3, 7):  # looking at every object takes half a second
                return
            gc.collect()
            alive.append(sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in gc.get_objects()))

    trainer = make_trainer(tiny_config(tmp_path, "run.max_steps=7", *settings), poison=poison)
    trainer.hooks = [Count()]
    trainer.fit()
    after_3, after_7 = alive
    assert after_3 == after_7


@pytest.mark.parametrize(
    ("settings", "runs"),
    [((), 1), (("run.accumulate_steps=3", "run.negatives=all"), 5)],  # there, with gradients of two thirds of the step
)
def test_training_that_runs_out_of_memory_loses_no_step(settings: tuple[str, ...], runs: int, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path, *settings))
    forward = trainer.student.forward
    in_step_5: list[bool] = []

    def full(images: list[torch.Tensor], texts: torch.Tensor):
        if trainer.state.step == 4:
            in_step_5.append(True)
        if len(in_step_5) == runs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(images, texts)

    trainer.student.forward = full  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"memory ran out with run\.batch_size=4 .*20\.00 MiB"):
        trainer.fit()
    assert len(in_step_5) == runs
    assert [path.name for path in list_checkpoints(trainer.plan.checkpoints)] == ["step_00000004"]
    resumed = make_trainer(trainer.config, plan=plan_run(trainer.config, "auto"))
    resumed.fit()
    whole = make_trainer(replace(trainer.config, name="whole"))
    whole.fit()
    assert torch.equal(flat(resumed.student), flat(whole.student))
