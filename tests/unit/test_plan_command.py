"""`cosmos-fast plan`: what it assumes, and what the command shows."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from rich.console import Console

from cosmos_fast.cli import plan_tables
from cosmos_fast.cli.main import command, run
from cosmos_fast.engine.plan import Assumptions, assume
from cosmos_fast.engine.plan.hardware import SHEETS, names
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.peak_rates import published_peak


def test_every_gpu_of_the_table_has_a_published_rate() -> None:
    for name in SHEETS:
        assert published_peak(name, "fp16") is not None, name
        assert assume(name.lower(), "fp16").memory_gb == SHEETS[name].memory_gb
    assert assume("NVIDIA A100-SXM4-80GB".replace("SXM4-", ""), "bf16").memory_gb == 80
    assert assume("a100_40gb", "bf16").memory_gb == 40


def test_every_assumption_has_unit_and_source_and_can_be_set() -> None:
    rates = assume("h100", "bf16")
    assert [name for name, *_ in rates.described()] == names() == [one.name for one in fields(Assumptions)][:-1]
    assert all(unit and source for _, _, unit, source in rates.described())
    for name in names():
        changed = assume("h100", "bf16", {name: 0.25})
        assert getattr(changed, name) == 0.25
        assert changed.sources[name] == "given"
    every = dict.fromkeys(("peak_tflops", "memory_gb", "hbm_gb_s", "link_gb_s", "network_gb_s"), 10.0)
    assert assume("my own", "bf16", every).peak_tflops == 10


@pytest.mark.parametrize(
    ("gpu", "precision", "given", "message"),
    [
        ("h1oo", "bf16", {}, "did you mean 'H100'"),
        ("x", "bf16", {"peak_tflops": 1.0}, "--assume memory_gb=…"),
        ("v100", "bf16", {}, "V100 has no published rate in bf16"),
        ("h100", "bf16", {"mfuu": 1.0}, "did you mean 'mfu'"),
        ("h100", "bf16", {"mfu": 1.5}, "between 0 and 1"),
        ("h100", "bf16", {"mfu": 0.0}, "above 0"),
        ("h100", "bf16", {"network_gb_s": float("nan")}, "above 0"),
        ("h100", "bf16", {"overlap": -1.0}, "0 or above"),
    ],
)
def test_wrong_assumptions_are_refused(gpu: str, precision: str, given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        assume(gpu, precision, given)


def test_the_command_shows_stages_and_says_that_it_is_a_model(capsys) -> None:
    arguments = ["plan", "--recipe", "cc12m_vit_b_16", "--gpus", "128", "--gpu", "h100", "--global-batch", "32768"]
    assert run(command, arguments) == 0
    text = capsys.readouterr().out
    assert "128 x h100 (16 servers of 8), 32768 samples a step, in bf16" in text
    assert "A model, not a measurement" in text
    assert all(name in text for name in names())
    assert "run.batch_size=128 run.accumulate_steps=2" in text
    assert all(f"│ {stage}" in text for stage in range(4))
    assert run(command, [*arguments[:3], "--gpus", "8,24,64", "--assume", "mfu=0.3"]) == 0
    text = capsys.readouterr().out
    assert "left out: 24 GPUs, among which 4096 samples do not divide evenly" in text
    assert "│ 64" in text
    assert "given" in text


def test_what_is_not_modelled_is_said(capsys) -> None:
    arguments = ["plan", "--recipe", "cc12m_vit_b_16", "--set", "deepspeed.zero_optimization.offload_optimizer.device="]
    for device, times in (("cpu", 1), ("none", 0)):
        for more in (["--gpus", "8"], ["--gpus", "8,16"], ["--gpus", "8", "--json"]):
            assert run(command, [*arguments[:-1], arguments[-1] + device, *more]) == 0
            assert capsys.readouterr().out.count("its time is not part of the model") == times


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        (["compute.cuda_graphs=true"], [3]),
        (["compute.linear=fp8"], [3]),
        (["deepspeed.zero_optimization.offload_optimizer.device=cpu"], [0]),
        (["run.teacher_copy=parts", "compute.compile=true"], [0, 3]),
        ([], []),
    ],
)
def test_stages_that_train_refuses_are_left_out(settings: list[str], left_out: list[int], capsys) -> None:
    arguments = ["plan", "--recipe", "cc12m_vit_b_16", *(word for one in settings for word in ("--set", one))]
    for more in (["--gpus", "8"], ["--gpus", "8,16"], ["--gpus", "8", "--json"]):
        assert run(command, [*arguments, *more]) == 0
        text = capsys.readouterr().out
        assert [stage for stage in range(4) if f"left out: stage {stage} (" in text] == left_out
        assert ("timed at the rate of bf16" in text) == ("compute.linear=fp8" in settings)
    assert {row["stage"] for row in json.loads(text)["layouts"]} == {0, 1, 2, 3} - {*left_out}
    assert run(command, [*arguments, "--gpus", "1", "--json"]) == 0  # one rank has no stages
    assert len(json.loads(capsys.readouterr().out)["layouts"]) == 4


def test_json_holds_the_same(capsys) -> None:
    assert run(command, ["plan", "--recipe", "cc12m_vit_b_16", "--gpus", "8,16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "not a measurement" in found["note"]
    assert found["assumptions"]["mfu"] == {
        "value": 0.4,
        "unit": "of peak_tflops",
        "source": "the bar of this project, not yet measured on any GPU",
    }
    rows = found["layouts"]
    assert [(row["ranks"], row["stage"]) for row in rows] == [(n, stage) for n in (8, 16) for stage in range(4)]
    assert [sum(row["best"] for row in rows if row["ranks"] == n) for n in (8, 16)] == [1, 1]
    for row in rows:
        memory = row["memory_gib"]
        parts = [value for name, value in memory.items() if name not in ("total", "limit")]
        assert sum(parts) == pytest.approx(memory["total"])
        assert row["received_bytes"] == pytest.approx(sum(one["received_bytes"] for one in row["transfers"]))
        assert row["step_ms"] == pytest.approx(sum(row["compute_ms"].values()) + row["exposed_ms"])
        assert row["hours"] == pytest.approx(32 * 10_010_225 / row["samples_per_s"] / 3600)
        assert row["global_batch"] == 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "many"], "give a number of GPUs"),
        (["--gpus", "0"], "give a number of GPUs"),
        (["--gpus", "24"], "4096 samples a step do not divide evenly among 24 ranks"),
        (["--assume", "mfu"], "not of the form NAME=NUMBER"),
        (["--assume", "mfu=fast"], "not of the form NAME=NUMBER"),
        (["--gpu", "h101"], "is not in the table"),
        (["--set", "run.batch=2"], "did you mean"),
        (["--global-batch", "100000000000"], "more than the plan takes, 1000000000"),
        (["--set", "run.teacher_copy=parts", "--set", "compute.cuda_graphs=true"], "set run.teacher_copy"),
        (["--set", "deepspeed.zero_optimization.reduce_bucket_size=0"], "of 1 or above"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys) -> None:
    assert run(command, ["plan", "--recipe", "cc12m_vit_b_16", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_name_of_a_run_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    plan_tables._print(Console(), "[a-b]:cat:")
    assert capsys.readouterr().out == "[a-b]:cat:\n"
