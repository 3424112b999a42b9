"""Finding the batch size: the search, the measurement, the command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import TrainConfig, dump_config
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import batch_trial
from cosmos_fast.engine.batch_size import LARGEST, BatchSizeSearch
from cosmos_fast.engine.batch_trial import measure_peak
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import make_trainer, tiny_config

MIB, GIB = 2**20, 2**30


def search_with(peak: Callable[[int], float], limit: float) -> tuple[int, list[int]]:
    """The size found on a machine of that memory, and those that were run on the way."""

    def measure(size: int) -> int | None:
        return round(peak(size)) if peak(size) <= limit else None

    search = BatchSizeSearch(measure, round(limit))
    found = search.run()
    sizes = [trial.batch_size for trial in search.trials]
    assert len(sizes) == len(set(sizes)) <= 20
    assert found == 0 or found in sizes  # verified by running it
    return found, sizes


def test_a_straight_line_is_found_in_few_runs_and_never_overstepped() -> None:
    found, sizes = search_with(lambda size: 300 + 7.3 * size, 5000)
    assert found == int((5000 - 300) / 7.3)
    assert max(sizes) == found
    assert sizes[:2] == [1, 2]
    assert len(sizes) <= 8


@pytest.mark.parametrize(
    "peak",
    [
        lambda size: max(900, 300 + 4.0 * size),  # parameters hide the first activations
        lambda size: 300 + 4.0 * size + 60 * (size % 3),  # noise
        lambda size: 300 + 4.0 * size + 0.002 * size**2,  # what grows with its square
        lambda size: 300 + 4.0 * size + (500 if size > 600 else 0),  # a jump that no line foresees
    ],
)
def test_other_shapes_end_close_below_the_limit(peak: Callable[[int], float]) -> None:
    limit = 3000.0
    found, _ = search_with(peak, limit)
    best = max(size for size in range(1, 2000) if peak(size) <= limit)
    assert peak(found) <= limit
    assert found >= 0.9 * best


@pytest.mark.parametrize("best", [0, 1, 2, 3, 5, 9])
def test_small_sizes_are_found_exactly(best: int) -> None:
    assert search_with(lambda size: 1000 + 100 * size, 1000 + 100 * best + 50)[0] == best


def test_the_search_ends_where_nothing_grows() -> None:
    assert search_with(lambda size: 5, 10)[0] == LARGEST


def test_trials_say_what_was_expected() -> None:
    told = []
    search = BatchSizeSearch(lambda size: 100 + 10 * size, 1000, told.append)
    assert search.run() == 90
    assert told == search.trials
    assert [trial.expected_bytes for trial in told[:2]] == [None, None]
    assert all(trial.expected_bytes == trial.peak_bytes for trial in told[2:])


def measurable(folder: Path, *overrides: str) -> TrainConfig:
    """Tiny in parameters, large in activations."""
    size = "{image_size: 64, patch_size: 4, width: 32, layers: 2, head_width: 16}"
    return tiny_config(folder, f"model.vision={size}", "data.views.local_image_size=32", "run.threads=1", *overrides)


@pytest.fixture(scope="module")
def two_samples_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Peak of the measured process with a batch of 2."""
    peak = measure_peak(measurable(tmp_path_factory.mktemp("two")), 2, 100 * GIB)
    assert peak is not None
    return peak


def test_one_process_measures_one_size(two_samples_bytes: int, tmp_path: Path) -> None:
    config = measurable(tmp_path)
    large = measure_peak(config, 10, 100 * GIB)
    assert large is not None
    assert 1 * MIB < (large - two_samples_bytes) / 8 < 30 * MIB
    assert measure_peak(config, 10, (two_samples_bytes + large) // 2) is None  # ended on the way
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_measured_process_come_back(tmp_path: Path) -> None:
    config = measurable(tmp_path, "compute.layer_norm=apex")
    with pytest.raises(UserError, match="apex"):
        measure_peak(config, 1, 100 * GIB)


def test_command_prints_the_setting_and_writes_nothing(two_samples_bytes: int, tmp_path: Path, capfd) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(measurable(tmp_path / "runs")))
    limit_gib = (two_samples_bytes + 40 * MIB) / GIB
    arguments = ["train", "--config", str(file), "--find-batch-size", "--memory-limit", str(limit_gib)]
    assert run(command, arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    found = re.fullmatch(r"--set run\.batch_size=(\d+)", lines[-1])
    assert found
    assert 4 <= int(found[1]) <= 30
    rows = [line.split() for line in lines if re.match(r" +\d+ ", line)]
    fitting = {int(row[0]): float(row[1]) for row in rows if row[1] != "too"}
    assert max(fitting) == int(found[1])
    assert fitting[int(found[1])] <= limit_gib
    assert any(line.startswith("memory = ") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--find-batch-size", "--memory-limit", "0"], "--memory-limit"),
        (["--find-batch-size", "--memory-limit", "much"], "--memory-limit"),
        (["--find-batch-size", "--memory-limit", "1e9"], "is more than cpu has"),
        (["--find-batch-size", "--memory-limit", "0.01"], "a batch of 1 does not fit 0.01 GiB"),
        (["--find-batch-size", "--resume"], "leave out"),
        (["--memory-limit", "1"], "--find-batch-size"),
    ],
)
def test_mistakes_of_the_command(arguments: list[str], message: str, tmp_path: Path, capfd) -> None:
    out_dir = tmp_path / "runs"
    changes = ["--set", f"run.out_dir={out_dir}", "--set", "run.device=cpu"]
    assert run(command, ["train", "--recipe", "demo", *changes, *arguments]) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not out_dir.exists()


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_both_processes_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(measurable(tmp_path / "runs")))
    program = "from cosmos_fast.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "train", "--config", str(file), "--find-batch-size"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would inherit "ignore"
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    while not process.stdout.readline().lstrip().startswith("batch"):
        assert process.poll() is None
    time.sleep(0.5)  # in the middle of the first size
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.split() == ["interrupted"]
    for _ in range(100):  # multiprocessing's own helper sees the end by itself
        if not group_is_alive(process.pid):
            break
        time.sleep(0.05)
    assert not group_is_alive(process.pid)


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

    def run_steps(config: TrainConfig, device: torch.device) -> None:
        sizes.append(config.run.batch_size)
        if config.run.batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(batch_trial, "run_steps", run_steps)
    config = tiny_config(tmp_path)
    assert measure_peak(config, 8, 4 * GIB) == 123
    assert measure_peak(config, 9, 4 * GIB) is None
    assert (sizes, fractions) == ([8, 9], [0.5, 1.0, 0.5, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_finds_a_size(tmp_path: Path) -> None:
    config = measurable(tmp_path, "run.device=cuda")
    limit = 2 * GIB
    search = BatchSizeSearch(lambda size: measure_peak(config, size, limit), limit)
    found = search.run()
    peak = measure_peak(config, found, limit)
    assert peak is not None
    assert 0.8 * limit < peak <= limit


def test_full_captions_are_what_is_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    batch: Batch = make_trainer(config).loader.__iter__().__next__()
    assert bool((batch.texts.argmax(dim=2) == config.model.text.context_length - 1).all())
