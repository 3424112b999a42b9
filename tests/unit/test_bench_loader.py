"""The benchmarks of the input: equal samples on all sides, and clocks that count what they should."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_loader, bench_tokenizer, fed_step, loader_parts, original_input, sides
from benchmarks.input_shards import training_captions, write_shards
from benchmarks.loader_setting import Setting, missing_loaders
from benchmarks.plain_tokenizer import PlainTokenizer
from benchmarks.rows import Row
from benchmarks.shapes import mini_step
from benchmarks.stages import watching
from cosmos_fast.data.index import Index
from cosmos_fast.data.tokenizer import tokenize
from tests.ranks import PRELOADED

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = write_shards(tmp_path_factory.mktemp("shards"), 6, width=120, height=90)
    return Setting(folder=str(folder), samples=6, width=120, height=90, batch=2, image_px=48, local_px=24)


def test_the_plain_tokenizer_gives_the_recorded_ids() -> None:
    ids = PlainTokenizer()(RECORDED["texts"], RECORDED["context_length"])
    assert ids.tolist() == RECORDED["ids"]


def test_both_tokenizers_agree_on_training_captions() -> None:
    captions = training_captions(40)
    assert len(captions) == 320
    assert any(not text.isascii() or "&" in text for text in captions)  # those that must be mended
    assert torch.equal(PlainTokenizer()(captions), tokenize(captions))


def test_shards_are_the_same_every_time_and_full_of_variety(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path / name, 3, width=40, height=30) for name in "ab")
    assert (first / "00000.tar").read_bytes() == (second / "00000.tar").read_bytes()
    captions = training_captions(60)
    assert len(set(" ".join(captions).split())) > 2000
    lengths = (tokenize(captions) != 0).sum(1).view(60, 8).double().mean(0)
    assert lengths[:2].mean() > 1.5 * lengths[2:].mean()


def test_a_loader_with_other_crops_or_other_ids_is_found_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loader_parts.check(setting, ["pil"])
    with monkeypatch.context() as changed:
        changed.setattr(original_input, "cut", lambda image, view: image.resize((view.size, view.size)))
        with pytest.raises(AssertionError, match="levels away"):
            loader_parts.check(setting, ["pil"])
    with monkeypatch.context() as changed:
        changed.setattr(PlainTokenizer, "encode", lambda self, text: [320])
        with pytest.raises(AssertionError, match="other ids"):
            loader_parts.check(setting, ["pil"])


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def burning(here: float, below: float) -> Generator[None, None, None]:
    """Takes processor time in its process, and in one below it, for each of three batches."""
    code = f"import time\nwhile time.process_time() < {below}: pass"
    for _ in range(3):
        burn(here)
        subprocess.run([sys.executable, "-S", "-c", code], check=True)
        yield
    raise OSError("no such shard")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_processor_time_counts_processes_below_and_not_waiting_and_failures_are_told() -> None:
    with sides.Side("one", partial(burning, 0.1, 0.15)) as side:
        side.lap(1)
        lap = side.lap(2)
        with pytest.raises(RuntimeError, match=r"one: (?s:.*)no such shard"):
            side.lap(1)
    assert 0.45 < lap.cpu_s < 0.9  # 0.5, and starting an interpreter twice
    assert lap.wall_s > 0.45


def test_stages_sum_to_the_wall_and_inner_ones_are_not_counted_twice(setting: Setting) -> None:
    places = {
        "read": ("cosmos_fast.data.index:Index.read",),
        "all": ("benchmarks.original_input:OriginalInput.__getitem__",),
    }
    before = Index.read
    source = original_input.OriginalInput(setting.config("pil", 0), image_size=48, context_length=77, seed=0)
    with watching(places) as stages:
        before_s = time.perf_counter()
        stages.start()
        start_s = time.perf_counter()
        source[0]
        burn(0.05)
        end_s = time.perf_counter()
        stages.stop()
        after_s = time.perf_counter()
    assert Index.read is before
    assert set(stages.seconds) == {"read", "all", "other"}
    assert end_s - start_s <= sum(stages.seconds.values()) <= after_s - before_s + 1e-6
    assert stages.seconds["other"] >= 0.05
    assert stages.seconds["read"] < stages.seconds["all"]


def test_stage_rows_sum_to_their_wall(setting: Setting) -> None:
    for name in ("original", "pil", *(["dali"] if not missing_loaders("cpu") else [])):
        others = []
        while len(others) < 10 and min(others, default=1) > 0.3:  # as long as the machine is busy with something else
            rows = {row.metric.rpartition("/")[2]: row.value for row in loader_parts.measure_stages(setting, name)}
            wall = rows.pop("wall")
            assert sum(rows.values()) == pytest.approx(wall)
            decoding = {"check", "DALI", "cut"} if name == "dali" else {"decode", "cut"}
            assert {"read", "captions", "tokenize", "draw", "colour", "normalise", *decoding} <= set(rows)
            others.append(rows["other"] / wall)
        assert min(others) < 0.3


def run(command: Any, arguments: list[str], out: Path) -> dict[str, Row]:
    command.main(args=[*arguments, "--out", str(out)], standalone_mode=False)
    return {row["metric"]: Row(**row) for row in json.loads(out.read_text())}


def test_the_tokenizer_benchmark_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tokenizer, "SEEN_SAMPLES", 4)
    rows = run(bench_tokenizer.command, ["--batch", "2"], tmp_path / "tokenizer.json")
    assert {"batch_ms", "first_batch_ms", "captions_per_s", "plain_captions_per_s"} <= set(rows)
    assert rows["batch_ms"].bar == pytest.approx(1 / 3, rel=1e-3)
    assert rows["batch_ms"].shapes["captions"] == 16


@pytest.mark.long
def test_the_loader_benchmark_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("forkserver")  # as fresh as a spawned process, with torch imported
    context.set_forkserver_preload(PRELOADED)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(fed_step, "mini_step", partial(mini_step, width=64, layers=1))
    small = ["--samples", "4", "--batch", "2", "--width", "64", "--height", "48", "--workers", "1"]
    rows = run(bench_loader.command, small, tmp_path / "loader.json")
    loaders = bench_loader.usable_loaders(None, "cpu")
    metrics = ("cpu_ms_per_sample", "samples_per_s", "wall_ms_per_sample", "fed_step_ms", "stall_pct")
    assert {f"{metric}/{loader}" for metric in metrics for loader in loaders} <= set(rows)
    assert rows["cpu_ms_per_sample/pil"].bar == pytest.approx(1 / 1.3, rel=1e-3)
    assert 0 <= rows["stall_pct/pil"].value <= 100
    assert (tmp_path / "loader.svg").stat().st_size > 5000


def test_what_cannot_run_is_told(setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench_loader, "missing_loaders", lambda device: {"dali": "dali is not installed"})
    assert bench_loader.usable_loaders(None, "cpu") == ["pil"]
    assert "left out: dali is not installed" in capsys.readouterr().out
    with pytest.raises(Exception, match="cannot run here"):
        bench_loader.usable_loaders("dali", "cpu")
    parts = [name for name, _ in bench_loader.plan(replace(setting, device="cuda"), ["pil", "dali"], 2, 7)]
    assert parts == ["on the GPU", "on the GPU, by part", "fed step, dali"] + [
        f"stages, {name}" for name in ("original", "pil", "dali")
    ]
