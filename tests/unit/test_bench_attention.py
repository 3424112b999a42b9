"""The attention benchmark at sizes of a test: every case, checked before it is timed."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_attention
from benchmarks.attention_cases import NAMES, ONE_QUERY, make_case, padded_mask
from benchmarks.bench_attention import PADDED, Setting, attend_packed, attend_padded, check, least_work, make_inputs
from cosmos_fast.ops.attention import packed_attention

SETTING = Setting("cpu", "sdpa", 7)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_attention, "HEADS", 2)
    monkeypatch.setattr(bench_attention, "HEAD_DIM", 8)


def test_every_case_is_measured(tmp_path):
    out = tmp_path / "attention.json"
    result = CliRunner().invoke(bench_attention.command, ["--count", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = {row["metric"]: row for row in json.loads(out.read_text()) if row["baseline"] == PADDED}
    assert list(found) == [f"forward_backward_ms/{name}" for name in NAMES]
    assert all(row["ratio"] > 0 for row in found.values())
    queries = {name: found[f"forward_backward_ms/{name}"]["shapes"]["queries"] for name in NAMES}
    assert [queries[name] for name in NAMES if name.endswith(ONE_QUERY)] == [3, 3, 3]
    assert (queries["global crops"], queries["local crops"]) == (3 * 197, 3 * 37)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded_compute_the_same(name, backend):
    """Laid out for a backend that rounds lengths up, and for one that takes them as they are."""
    case = make_case(name, 5, backend, "cpu")
    assert case.sequences.rounded == (backend == "sdpa" and name == "captions" + ONE_QUERY)
    inputs = make_inputs(case, SETTING, 0)
    packed = attend_packed(inputs, case, "sdpa")
    padded = attend_padded(inputs, padded_mask(case, torch.float32))
    for i, part in enumerate(packed.split(case.queries)):
        torch.testing.assert_close(part, padded[i, : len(part)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["captions", "captions" + ONE_QUERY, "local crops" + ONE_QUERY])
def test_a_backend_that_is_wrong_is_not_timed(name, monkeypatch):
    case = make_case(name, 5, "sdpa", "cpu")
    check(case, SETTING, "sdpa")

    def scaled(q, k, v, *sequences, factor, **options):
        return packed_attention(q, k * factor, v, *sequences, **options)

    monkeypatch.setattr(bench_attention, "packed_attention", partial(scaled, factor=1.001))
    with pytest.raises(AssertionError, match="disagrees"):
        check(case, SETTING, "sdpa")


def test_one_query_is_less_work_and_reads_the_same_keys():
    every, single = (least_work(make_case(f"local crops{one}", 4, "sdpa", "cpu")) for one in ("", ONE_QUERY))
    row = 2 * 8
    (flops, moved), (grad_flops, grad_moved) = every
    assert (flops, moved) == (4 * 4 * 37 * 37 * row, 2 * 4 * 4 * 37 * row)
    assert (grad_flops, grad_moved) == (2.5 * flops, 2 * moved)
    (flops_one, moved_one), _ = single
    assert flops_one == flops / 37
    assert moved_one == 2 * row * (2 * 4 + 2 * 4 * 37)
