"""`train --profile`: the ledger of a real run, what is written, and that nothing else is."""

from __future__ import annotations

import gc
import gzip
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cosmos_fast.cli import profiling
from cosmos_fast.cli.main import command, run
from cosmos_fast.engine import profiler
from cosmos_fast.engine.profiler import Operator, Profile, profile_run
from cosmos_fast.engine.run_folder import RunPlan
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.model.flops import sample_flops
from cosmos_fast.utils import phases
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.peak_rates import PeakRate
from cosmos_fast.utils.phases import OTHER, PHASES, PhaseTimer
from tests.shards import write_shards
from tests.tiny_run import TINY, FakeLoader, make_trainer, rows_of, tiny_config


def profiled(tmp_path: Path, *overrides: str, recipe: str = "demo", steps: int = 2) -> Profile:
    config = tiny_config(tmp_path, *overrides, recipe=recipe)
    timer = PhaseTimer(torch.device("cpu"))
    plan = RunPlan(tmp_path / config.name)
    trainer = Trainer(config, FakeLoader(config), plan=plan, clock=timer)  # type: ignore[arg-type]
    return profile_run(trainer, timer, steps, plan.folder / "profile")


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(profiler, "measured_rate", lambda device, precision: PeakRate(1e11, "measured: made up"))
    monkeypatch.setattr(profiler, "WARMUP_STEPS", 1)
    monkeypatch.setattr(profiler, "TRACE_STEPS", 1)
    # Processor time: what else the machine does is no part of any phase, nor of "other".
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=time.thread_time))
    gc.disable()  # nor is what former tests have left
    yield
    gc.enable()


@pytest.fixture
def _no_trace(monkeypatch) -> None:
    """torch's profiler takes seconds."""

    def trace(stepper: object, folder: Path, files: dict[str, str]) -> list[Operator]:
        (folder / "trace.json").write_text("{}")
        files["trace"] = "trace.json"
        return []

    monkeypatch.setattr(profiler, "_trace", trace)


@pytest.mark.usefixtures("_no_trace")
@pytest.mark.parametrize("recipe", ["demo", "demo_clip"])
def test_the_ledger_sums_to_the_wall_and_counts_the_useful_flops(recipe: str, tmp_path: Path) -> None:
    found = profiled(tmp_path, "run.accumulate_steps=2", recipe=recipe, steps=3)
    ledger = found.ledger
    assert list(ledger.phase_ms) == [*PHASES, OTHER]
    assert sum(ledger.phase_ms.values()) == pytest.approx(ledger.wall_ms)
    assert 0 <= ledger.share_pct(OTHER) < 20
    busy = {"data", "student", "loss", "backward", "optimizer"} | ({"teacher"} if recipe == "demo" else set())
    assert {phase for phase in PHASES if ledger.phase_ms[phase] > 0} == busy
    assert (ledger.steps, found.samples) == (3, 8)
    config = tiny_config(tmp_path, recipe=recipe)
    for pruned, flops in ((True, found.flops), (False, found.flops_unpruned)):
        counted = sample_flops(config.model, config.data.views, global_batch=4, pruned=pruned)
        assert flops == pytest.approx(8 * counted.training)
    assert found.samples_per_s == pytest.approx(8e3 / ledger.wall_ms)
    assert found.data_stall_pct == pytest.approx(100 * ledger.phase_ms["data"] / ledger.wall_ms)
    assert found.mfu_pct() == pytest.approx(100 * found.flops / (ledger.wall_ms / 1e3) / 1e11)
    unpruned = found.mfu_pct(pruned=False)
    assert unpruned is not None
    assert unpruned > found.mfu_pct()  # type: ignore[operator]


@pytest.mark.usefixtures("_no_trace")
def test_with_all_negatives_the_second_forward_is_a_phase_and_no_useful_work(tmp_path: Path) -> None:
    found = profiled(tmp_path, "run.accumulate_steps=2", "run.negatives=all", steps=2)
    assert found.ledger.phase_ms["recompute"] > 0
    assert sum(found.ledger.phase_ms.values()) == pytest.approx(found.ledger.wall_ms)
    assert 0 <= found.ledger.share_pct(OTHER) < 20
    config = tiny_config(tmp_path)
    counted = sample_flops(config.model, config.data.views, global_batch=8)
    assert found.flops == pytest.approx(8 * counted.training)


@pytest.mark.usefixtures("_no_trace")
def test_every_part_of_a_step_counts_to_its_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the peak of memory is that of the timed steps, not of what came before them."""
    config = tiny_config(tmp_path, "run.accumulate_steps=2", "run.negatives=all")
    timer = PhaseTimer(torch.device("cpu"))
    trainer = Trainer(config, FakeLoader(config), plan=RunPlan(tmp_path / "run"), clock=timer)  # type: ignore[arg-type]
    seen: dict[str, list[str]] = {}

    def phase() -> str:
        return timer._open[-1] if timer._open else OTHER

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: object, **options: object) -> object:
            seen.setdefault(name, []).append(phase())
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(trainer.teacher, "encode_views")
    watch(trainer.student, "forward")
    watch(type(trainer.gradients.objective), "__call__")
    watch(trainer.optimizer, "step")
    trainer.student.logit_scale.register_hook(lambda gradient: seen.setdefault("gradient", []).append(phase()))
    resets: list[int] = []
    monkeypatch.setattr(profiler, "reset_peak", lambda device: resets.append(trainer.state.step))
    profile_run(trainer, timer, 1, tmp_path / "profile")
    assert resets == [profiler.WARMUP_STEPS]
    steps = trainer.state.step
    assert seen == {
        "encode_views": ["teacher"] * 2 * steps,
        "forward": ["student", "student", "recompute"] * steps,
        "__call__": ["loss"] * steps,
        "gradient": ["backward"] * 2 * steps,  # of a scale: it takes part in the pass of each micro-batch
        "step": ["optimizer"] * steps,
    }


def test_files_and_table_say_the_same(tmp_path: Path, capsys) -> None:
    found = profiled(tmp_path)
    folder = tmp_path / "demo" / "profile"
    assert {path.name for path in folder.iterdir()} == {"ledger.json", "trace.json"}
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["profile"]
    stored = json.loads((folder / "ledger.json").read_text())
    assert stored["ledger"]["phase_ms"] == found.ledger.phase_ms
    assert stored["mfu_pct"] == found.mfu_pct()
    assert stored["peak"]["source"] == "measured: made up"
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"phase: student", "phase: backward", "phase: optimizer"} <= names
    assert "[memory]" in names
    assert found.operators[0].cpu_ms >= found.operators[-1].cpu_ms > 0
    assert "aten::addmm" in names
    assert {one.name for one in found.operators} <= names
    console = Console(width=140, record=True)
    profiling.show(found, folder, console)
    shown = console.export_text() + capsys.readouterr().out
    for text in ("student", "wall", "MFU", "made up", "waiting for data", "no memory snapshot", "trace.json"):
        assert text in shown, text
    assert "recompute" not in shown


@pytest.mark.usefixtures("_no_trace")
def test_an_existing_run_is_left_alone_and_a_former_profile_replaced(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path, "run.max_steps=2"))
    trainer.fit()
    folder = trainer.plan.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "profile").mkdir()
    (folder / "profile" / "memory_snapshot.pickle").write_text("of another day")
    profiled(tmp_path, steps=1)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"ledger.json", "trace.json"}
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("failing", [False, True])
def test_a_snapshot_records_one_step_and_stops_recording(failing: bool, tmp_path: Path, monkeypatch) -> None:
    """The part for CUDA, with torch's recorder stood in for."""
    config = tiny_config(tmp_path)
    timer = PhaseTimer(torch.device("cpu"))
    trainer = make_trainer(config)
    calls: list[object] = []

    def record(enabled: str | None = "all", max_entries: int | None = None) -> None:
        calls.append((enabled, trainer.state.step))

    def dump(path: str) -> None:
        calls.append("dump")
        if failing:
            raise OSError("No space left on device")
        Path(path).write_text("a snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    files: dict[str, str] = {}
    told = pytest.raises(UserError, match="cannot be written") if failing else nullcontext()
    with told:
        profiler._snapshot(profiler._Stepper(trainer, timer), tmp_path, files)
    assert calls == [("all", 0), "dump", (None, 1)]
    assert files == ({} if failing else {"memory_snapshot": "memory_snapshot.pickle"})


def test_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("cosmos_fast.engine.build.create_model", full)
    shards = write_shards(tmp_path / "shards", (6,))
    settings = [*TINY, f"run.out_dir={tmp_path / 'runs'}", f"data.train=[{{path: {shards}}}]", "data.workers=0"]
    assert run(command, ["train", "--recipe", "demo", "--profile", *(f"--set={setting}" for setting in settings)]) == 2
    assert "memory ran out with run.batch_size=4" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(UserError, match=r"the profile cannot be written to .*set run.out_dir"):
        profiled(tmp_path)


def test_the_command_profiles_with_the_real_loader_and_compresses_a_large_trace(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(profiler, "LARGE_BYTES", 1000)
    shards = write_shards(tmp_path / "shards", (6,))
    settings = [*TINY, f"run.out_dir={tmp_path / 'runs'}", f"data.train=[{{path: {shards}}}]", "data.workers=0"]
    settings.append("model.text={context_length: 8, vocab_size: 49408, width: 16, heads: 2, layers: 2}")
    arguments = ["train", "--recipe", "demo", "--profile", "--profile-steps", "1"]
    assert run(command, [*arguments, *(f"--set={setting}" for setting in settings)]) == 0
    assert [path.name for path in (tmp_path / "runs" / "cosmos").iterdir()] == ["profile"]
    folder = tmp_path / "runs" / "cosmos" / "profile"
    assert {path.name for path in folder.iterdir()} == {"ledger.json", "trace.json.gz"}
    with gzip.open(folder / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    stored = json.loads((folder / "ledger.json").read_text())
    assert stored["samples"] == 4
    assert stored["data_stall_pct"] > 0
    assert "peak memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--profile-steps", "3"], "give --profile as well"),
        (["--profile", "--resume"], "leave out --resume, --overwrite, --dry-run"),
        (["--profile", "--overwrite"], "leave out --resume"),
        (["--profile", "--memory-limit", "4"], "--find-batch-size, --memory-limit"),
        (["--profile", "--set", "data.train=[]"], "data.train is empty"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments: list[str], told: str, tmp_path: Path, capsys) -> None:
    common = ["train", "--recipe", "demo", f"--set=run.out_dir={tmp_path / 'runs'}"]
    assert run(command, [*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert not (tmp_path / "runs").exists()


def test_rows_have_peak_memory_and_mfu_where_the_rate_is_known(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_config(tmp_path, "run.max_steps=3", "run.log_every_steps=2"))
    assert trainer.peak_rate is None  # a CPU
    trainer.peak_rate = PeakRate(1e10, "made up")
    trainer.fit()
    rows = rows_of(trainer)
    assert all(row["peak_memory_mib"] > 10 for row in rows)
    first, second = rows[:2]
    wall_s = (second["step_ms"] + second["data_ms"]) / 1e3
    assert second["mfu_pct"] == pytest.approx(100 * (second["flops"] - first["flops"]) / wall_s / 1e10)
    log = (trainer.plan.folder / "log.txt").read_text()
    assert "MFU" in log
    assert "peak" in log
    config = replace(tiny_config(tmp_path, "run.max_steps=1"), name="unknown")
    trainer = make_trainer(config)
    trainer.fit()
    assert "mfu_pct" not in rows_of(trainer)[0]
