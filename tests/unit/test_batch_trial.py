"""One size of the batch-size search: what a process measures, how it ends, and the same in place on CUDA."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import batch_trial
from cosmos_fast.engine.batch_size import BatchSizeSearch
from cosmos_fast.engine.batch_trial import measure_peak
from cosmos_fast.engine.gradients import Gradients
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks
from tests.lives import is_running
from tests.tiny_run import tiny_config

MIB, GIB = 2**20, 2**30
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def python(script: str, folder: Path) -> list[str]:
    """The command line of a script in a process of its own."""
    return [sys.executable, "-c", script, str(folder)]


def measurable(folder: Path, *overrides: str) -> TrainConfig:
    """Tiny in parameters, large in activations."""
    size = "{image_size: 64, patch_size: 4, width: 32, layers: 2, head_width: 16}"
    return tiny_config(folder, f"model.vision={size}", "data.views.local_image_size=32", "run.threads=1", *overrides)


MEASURE = """
import sys
from pathlib import Path
from cosmos_fast.engine.batch_trial import measure_peak
from tests.unit.test_batch_trial import GIB, measurable

config = measurable(Path(sys.argv[1]))
small, large = (measure_peak(config, size, 100 * GIB) for size in (2, 10))
print(small, large, measure_peak(config, 10, (small + large) // 2))
"""


def test_one_process_measures_one_size(tmp_path: Path) -> None:
    """From a process of its own, as a command is: memory that other tests freed would serve a fork of this one."""
    done = subprocess.run(python(MEASURE, tmp_path), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    small, large, ended_on_the_way = done.stdout.split()
    assert 1 * MIB < (int(large) - int(small)) / 8 < 30 * MIB
    assert ended_on_the_way == "None"
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_measured_process_come_back(tmp_path: Path) -> None:
    config = measurable(tmp_path, "compute.layer_norm=apex")
    with pytest.raises(UserError, match="apex"):
        measure_peak(config, 1, 100 * GIB)


SEARCH = """
import os, sys, torch
from cosmos_fast.engine import batch_trial
from tests.tiny_run import tiny_config

def busy(config, device, ranks):
    torch.set_num_threads(1)
    print(os.getpid(), flush=True)
    while True:
        torch.ones(64, 64) @ torch.ones(64, 64)

batch_trial.run_steps = busy
batch_trial.measure_peak(tiny_config(sys.argv[1]), 1, 2**50)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc whether a process still runs")
def test_a_search_that_is_killed_leaves_no_trial_behind(tmp_path: Path) -> None:
    search = subprocess.Popen(python(SEARCH, tmp_path), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert search.stdout is not None
    trial = int(search.stdout.readline())
    assert is_running(trial)
    search.kill()
    search.wait()
    search.stdout.close()
    try:
        deadline = time.monotonic() + 120
        while is_running(trial) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_running(trial)
    finally:
        if is_running(trial):
            os.kill(trial, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the measured process is a fork only there")
def test_a_trial_that_dies_is_too_large_if_the_kernel_ended_it_and_else_an_error(tmp_path: Path, monkeypatch) -> None:
    config = tiny_config(tmp_path)

    def end_by(number: signal.Signals) -> None:
        monkeypatch.setattr(batch_trial, "run_steps", lambda config, device, ranks: os.kill(os.getpid(), number))

    end_by(signal.SIGKILL)  # as the kernel does when memory runs out
    assert measure_peak(config, 1, 100 * GIB) is None
    end_by(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="died"):
        measure_peak(config, 1, 100 * GIB)


@pytest.mark.skipif(sys.platform != "linux", reason="the measured process is a fork only there")
def test_an_allocation_that_fails_in_the_measured_process_is_too_large(tmp_path: Path, monkeypatch) -> None:
    run_out_from(
        1, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), monkeypatch
    )
    assert measure_peak(tiny_config(tmp_path), 1, 100 * GIB) is None


def run_out_from(batch_size: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps over batches of that size and larger ones fail as an allocator fails."""
    accumulate = Gradients.accumulate

    def limited(self: Gradients, batches: Sequence[Batch]) -> torch.Tensor:
        if len(batches[0].keys) >= batch_size:
            raise error
        return accumulate(self, batches)

    monkeypatch.setattr(Gradients, "accumulate", limited)


def test_cuda_runs_in_place_under_the_limit(tmp_path: Path, monkeypatch) -> None:
    """The part for CUDA with a fake allocator: what it is told, and what an allocation that fails becomes."""
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(batch_trial, "resolve_device", lambda request: torch.device("cuda:0"))
    monkeypatch.setattr(batch_trial, "reset_peak", lambda device: 0)
    monkeypatch.setattr(batch_trial, "peak_bytes", lambda device: 123)
    sizes: list[int] = []

    run_steps = batch_trial.run_steps

    def run_on_cpu(config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
        assert device == torch.device("cuda:0")
        sizes.append(config.run.batch_size)
        run_steps(config, torch.device("cpu"))

    monkeypatch.setattr(batch_trial, "run_steps", run_on_cpu)
    run_out_from(9, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), monkeypatch)
    config = tiny_config(tmp_path)
    assert measure_peak(config, 8, 4 * GIB) == 123
    assert measure_peak(config, 9, 4 * GIB) is None
    assert (sizes, fractions) == ([8, 9], [0.5, 1.0, 0.5, 1.0])
    run_out_from(1, RuntimeError("shapes do not match"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_peak(config, 1, 4 * GIB)
    assert fractions[-1] == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_finds_a_size(tmp_path: Path) -> None:
    config = measurable(tmp_path, "run.device=cuda")
    limit = 2 * GIB
    search = BatchSizeSearch(lambda size: measure_peak(config, size, limit), limit)
    found = search.run()
    peak = measure_peak(config, found, limit)
    assert peak is not None
    assert 0.8 * limit < peak <= limit
