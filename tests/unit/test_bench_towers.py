"""The machine's own rates, and the packed text tower, at sizes of a test."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks import bench_packed_text, bench_rates
from benchmarks.bench_packed_text import Setting
from benchmarks.shapes import VIT_B_16
from cosmos_fast.model.packing import pack_text


def test_every_product_and_chunk_gets_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rates, "matmul_flops_per_s", lambda device, dtype: 1e12)
    monkeypatch.setattr(bench_rates, "copy_bytes_per_s", lambda device: 3e9)
    monkeypatch.setattr(bench_rates, "best_ms", call_in_2_ms)
    monkeypatch.setattr(bench_rates, "CHUNK_MIB", {"cpu": (1, 2)})
    monkeypatch.setattr(bench_rates, "TOKENS_A_SAMPLE", 10)
    out = tmp_path / "rates.json"
    result = CliRunner().invoke(bench_rates.command, ["--samples", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = {row["metric"]: row["value"] for row in json.loads(out.read_text())}
    assert found.pop("copy_gb_per_s") == 3.0
    assert found.pop("matmul_tflops/square") == 1.0
    assert len(found) == 4 * 3 + 2
    for direction in ("forward", "grad input", "grad weight"):
        assert found[f"matmul_tflops/mlp up 10x768x3072/{direction}"] > 0
    # 2 MiB of fp32 similarities, two products of depth 512.
    assert found["chunk_tflops/1 MiB"] == found["chunk_tflops/2 MiB"] == pytest.approx(0.53687)


def call_in_2_ms(call, x, device):
    call(x)
    return 2.0


def test_the_packed_tower_is_timed_after_it_equals_the_padded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_packed_text, "VIT_B_16", replace(VIT_B_16, vocab_size=500, text_width=64, text_heads=1))
    monkeypatch.setattr(bench_packed_text, "peak_mib", lambda work, *, device, settle: 2.0)
    out = tmp_path / "packed_text.json"
    result = CliRunner().invoke(bench_packed_text.command, ["--samples", "1", "--layers", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = {row["metric"]: row for row in json.loads(out.read_text())}
    assert list(found) == ["eager_forward_backward_ms", "forward_backward_ms", "eager_peak_mib", "peak_mib"]
    timed = found["forward_backward_ms"]
    assert (timed["bar"], timed["shapes"]["captions"]) == (0.6, 8)
    assert timed["ratio"] > 0
    assert found["peak_mib"]["ratio"] == 1.0


def test_captions_of_the_packed_tower_hold_about_half_of_the_padded_tokens():
    assert 0.5 < bench_packed_text.token_ratio(Setting(16, 4, "cpu", "fp32")) < 0.54


def test_a_packed_tower_that_disagrees_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_packed_text, "VIT_B_16", replace(VIT_B_16, vocab_size=500, text_width=64, text_heads=1))
    monkeypatch.setattr("cosmos_fast.model.text.pack_text", shift_positions)
    with pytest.raises(AssertionError, match="disagrees"):
        bench_packed_text.check(Setting(1, 1, "cpu", "fp32"))


def shift_positions(*arguments, **options):
    packed = pack_text(*arguments, **options)
    return replace(packed, positions=packed.positions.roll(1))
