"""Finding the batch size: the search and the command."""

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

from cosmos_fast.cli.batch_size import summarise
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import dump_config, load_config
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.batch_size import LARGEST, BatchSizeSearch, Line, Trial
from tests.lives import children
from tests.tiny_run import make_trainer, tiny_config
from tests.unit.test_batch_trial import ENVIRONMENT, measurable, python

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


def test_the_line_does_not_follow_the_noise_between_neighbours() -> None:
    trials = [Trial(4, 328), Trial(8, 366), Trial(9, 363)]  # 300 + 7 x batch, and 10 more at 8
    search = BatchSizeSearch(lambda size: 0, 1000, trials=trials)
    assert search.line == Line(base=300, slope=7)


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


@pytest.mark.parametrize("fits", [64, 40, 22, 5, 1])
def test_advice_that_is_followed_keeps_the_samples_of_a_step(fits: int, tmp_path: Path, capsys) -> None:
    config = tiny_config(tmp_path, "run.batch_size=60")
    for again in range(3):
        summarise(config, BatchSizeSearch(lambda size: 0, 0), fits)
        out = capsys.readouterr().out
        assert ("find it again" in out) == (again == 0 and fits < 60)
        if "samples a step" not in out:
            break
        advice = out.splitlines()[0]
        assert advice.startswith("for 60 samples a step")
        config = load_config(config, re.findall(r"--set (\S+)", advice))
        assert config.run.batch_size <= fits
        assert config.run.batch_size * config.run.accumulate_steps == 60
        assert config.run.negatives == "all"
    assert config.run.accumulate_steps == {64: 1, 40: 2, 22: 3, 5: 12, 1: 60}[fits]


TWO_SAMPLES = """
import sys
from pathlib import Path
from cosmos_fast.engine.batch_trial import measure_peak
from tests.unit.test_batch_trial import GIB, measurable

print(measure_peak(measurable(Path(sys.argv[1]) / "runs"), 2, 100 * GIB))
"""


def test_command_prints_the_setting_and_writes_nothing(tmp_path: Path) -> None:
    """In processes of their own: memory that other tests freed would serve a fork of this one."""
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(measurable(tmp_path / "runs")))
    # To three digits, as rows are shown: what fits does not pass it when rounded.
    limit_gib = round((int(output_of(python(TWO_SAMPLES, tmp_path))) + 40 * MIB) / GIB, 3)
    arguments = ["train", "--config", str(file), "--find-batch-size", "--memory-limit", str(limit_gib)]
    lines = output_of([sys.executable, "-m", "cosmos_fast.cli.main", *arguments]).splitlines()
    found = re.fullmatch(r"--set run\.batch_size=(\d+)", lines[-1])
    assert found
    assert 4 <= int(found[1]) <= 30
    rows = [line.split() for line in lines if re.match(r" +\d+ ", line)]
    fitting = {int(row[0]): float(row[1]) for row in rows if row[1] != "too"}
    assert max(fitting) == int(found[1])
    assert fitting[int(found[1])] <= limit_gib
    assert any(line.startswith("memory = ") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def output_of(command_line: list[str]) -> str:
    return subprocess.run(command_line, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


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
    while not children(process.pid):  # it measures the first size
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.split() == ["interrupted"]
    deadline = time.monotonic() + 120
    while group_is_alive(process.pid) and time.monotonic() < deadline:  # the last of it sees the end by itself
        time.sleep(0.02)
    assert not group_is_alive(process.pid)


def test_full_captions_are_what_is_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    batch: Batch = make_trainer(config).loader.__iter__().__next__()
    assert bool((batch.texts.argmax(dim=2) == config.model.text.context_length - 1).all())
