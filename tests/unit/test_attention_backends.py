"""Packed attention: every backend computes the definition, and is chosen or refused in words.

Backends whose packages are missing run on stand-ins that check what they are given.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import attention_limits, attention_varlen, backends
from cosmos_fast.ops.attention import Sequences, choose_attention, packed_attention
from cosmos_fast.utils.errors import UserError
from cosmos_kernels import triton_support
from tests import attention_fakes

HEADS, WIDTH = 2, 8
LENGTHS = [1, 5, 5, 5, 12, 3, 3]
CASES = {
    "full": (LENGTHS, LENGTHS, False),
    "causal": (LENGTHS, LENGTHS, True),
    "one query each": ([1] * len(LENGTHS), LENGTHS, True),
    "some whole, some one query": ([12, 12, 1, 1, 1], [12, 12, 4, 4, 9], True),
    "some queries": ([2, 2, 5, 3], [5, 5, 5, 7], True),
    "batch of one": ([6], [6], True),
    "longer, full": ([20, 17, 3], [20, 17, 3], False),
    "longer, causal": ([20, 17, 3], [20, 17, 3], True),
}


def inputs(queries: list[int], keys: list[int]) -> list[Tensor]:
    """Queries, keys and values, views of wider matrices as projections leave them."""
    torch.manual_seed(0)
    q_T3Hd, k_S3Hd = (torch.randn(sum(lengths), 3, HEADS, WIDTH, dtype=torch.float64) for lengths in (queries, keys))
    return [part.requires_grad_() for part in (q_T3Hd[:, 1], k_S3Hd[:, 0], k_S3Hd[:, 2])]


def result_and_gradients(out_THd: Tensor, parts: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [out_THd.detach(), *torch.autograd.grad(out_THd, parts, torch.randn_like(out_THd))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", *attention_fakes.FAKES])
def test_every_backend_computes_the_definition(backend, case, monkeypatch):
    queries, keys, causal = CASES[case]
    parts = inputs(queries, keys)
    sequences = Sequences.from_lengths(queries, keys)
    bounds = [[0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (queries, keys)]
    expected = result_and_gradients(attention_fakes.attention(*parts, *bounds, causal), parts)
    name = backend if backend == "sdpa" else attention_fakes.use(backend, monkeypatch)
    actual = result_and_gradients(packed_attention(*parts, sequences, causal=causal, backend=name), parts)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", attention_fakes.FAKES)
def test_what_is_kept_of_the_sequences_is_of_one_mask(backend, monkeypatch):
    """Blocks of a tower share their sequences; somebody may ask for both masks of them."""
    name = attention_fakes.use(backend, monkeypatch)
    parts, sequences = inputs(LENGTHS, LENGTHS), Sequences.from_lengths(LENGTHS)
    for causal in (False, True, False):
        found = packed_attention(*parts, sequences, causal=causal, backend=name)
        torch.testing.assert_close(found, packed_attention(*parts, sequences, causal=causal, backend="sdpa"))


@pytest.mark.skipif(triton_support.why_missing() is not None, reason=str(triton_support.why_missing()))
def test_the_triton_kernels_take_mixed_queries():
    """In the interpreter where there is no GPU; `test_attention_exactness.py` has the others."""
    device = "cpu" if triton_support.INTERPRETED else "cuda"
    dtype = torch.float32 if triton_support.INTERPRETED else torch.float16
    queries, keys, causal = CASES["some whole, some one query"]
    exact = inputs(queries, keys)
    parts = [part.detach().to(device, dtype).requires_grad_() for part in exact]
    bounds = [[0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (queries, keys)]
    expected = result_and_gradients(attention_fakes.attention(*exact, *bounds, causal), exact)
    sequences = Sequences.from_lengths(queries, keys, device=device)
    found = packed_attention(*parts, sequences, causal=causal, backend="triton")
    torch.manual_seed(1)
    direction = torch.randn(found.shape, dtype=torch.float64).to(found)
    tolerance = 8 * torch.finfo(dtype).eps  # on a GPU the inputs are rounded too
    for ours, theirs in zip([found.detach(), *torch.autograd.grad(found, parts, direction)], expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(triton_support.why_missing() is not None, reason=str(triton_support.why_missing()))
def test_sequences_too_long_for_the_triton_kernels_are_told():
    device = torch.device("cpu" if triton_support.INTERPRETED else "cuda")
    assert choose("triton", longest=256, device=device) == "triton"
    with pytest.raises(UserError, match="cannot run: sequences of 257 tokens, it takes at most 256"):
        choose("triton", longest=257, device=device)


@pytest.mark.skipif(find_spec(attention_varlen.MODULE) is None, reason="came with PyTorch 2.10")
@pytest.mark.parametrize("causal", [False, True])
def test_the_installed_pytorch_takes_these_arguments(causal):
    """Tensors without values: its function is there, takes what it is given and has a backward pass."""
    queries, keys, _ = CASES["some whole, some one query"]
    parts = [part.detach().to("meta", torch.bfloat16).requires_grad_() for part in inputs(queries, keys)]
    out_THd = attention_varlen.attend(*parts, Sequences.from_lengths(queries, keys, device="meta"), causal)
    assert out_THd.shape == parts[0].shape
    assert attention_varlen.varlen_function()[0].__module__ == attention_varlen.MODULE
    grads = torch.autograd.grad(out_THd, parts, torch.empty_like(out_THd))
    assert [grad.shape for grad in grads] == [part.shape for part in parts]


def test_lengths_become_groups_of_neighbours():
    sequences = Sequences.from_lengths([4, 4, 1, 1, 1], [4, 4, 4, 7, 7])
    assert sequences.query_groups == ((2, 4), (1, 1), (2, 1))
    assert sequences.key_groups == ((2, 4), (1, 4), (2, 7))
    assert sequences.cu_queries.tolist() == [0, 4, 8, 9, 10, 11]
    assert sequences.cu_keys.tolist() == [0, 4, 8, 12, 19, 26]
    assert (sequences.max_queries, sequences.max_keys, sequences.queries, sequences.keys) == (4, 7, 11, 26)
    assert not sequences.rounded


def test_rounded_keys_are_not_seen():
    """Sequences of 2, 3 and 5 tokens, rounded to 5, of which the last query only is asked."""
    visible = [2, 3, 5]
    rounded = Sequences.from_groups([(3, 1)], [(3, 5)], visible_keys=[torch.tensor(visible)])
    parts = inputs([1] * 3, [5] * 3)
    kept = torch.cat([5 * i + torch.arange(length) for i, length in enumerate(visible)])
    exact_parts = [parts[0], parts[1][kept], parts[2][kept]]
    expected = packed_attention(*exact_parts, Sequences.from_lengths([1] * 3, visible), causal=True, backend="sdpa")
    torch.testing.assert_close(packed_attention(*parts, rounded, causal=True), expected)
    with pytest.raises(ValueError, match="backend 'varlen' takes no rounded sequences"):
        packed_attention(*parts, rounded, causal=True, backend="varlen")


def choose(request: str, **changes: object) -> str:
    options = {"tokens": 64, "longest": 16, "heads": HEADS, "width": 64}
    device = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    return choose_attention(request, **{**options, **device, **changes})


def test_a_cpu_gets_sdpa_and_the_log_says_why(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_announced", set())
    caplog.set_level(logging.INFO, logger="cosmos_fast")
    assert choose("auto") == choose("auto") == "sdpa"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("attention runs on backend sdpa (")
    assert all(f"{name}: " in line for name in ("flash", "varlen", "xformers"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without GPU")
@pytest.mark.parametrize("name", ["flash", "varlen", "xformers"])
def test_a_request_that_cannot_be_met_is_one_line(name):
    with pytest.raises(UserError, match=f"attention: backend '{name}' was asked for but cannot run: [^\n]+$"):
        choose(name)


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="unknown backend 'flesh'; choose one of auto, flash, varlen, xformers, "):
        choose("flesh")


def tensor_like(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 64) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(100, 8, width))


@pytest.mark.parametrize(
    ("tensor", "objection"),
    [
        (tensor_like(), None),
        (tensor_like(dtype=torch.float16, width=256), None),
        (tensor_like("cpu"), "it takes CUDA tensors only, these are on cpu"),
        (tensor_like(dtype=torch.float32), "queries in float32, it takes bfloat16, float16: set run.precision=bf16"),
        (tensor_like(width=12), "heads of 12 channels, it takes multiples of 8 up to 256"),
        (tensor_like(width=264), "heads of 264 channels, it takes multiples of 8 up to 256"),
    ],
)
def test_what_fused_kernels_take(tensor, objection):
    assert attention_limits.why_not_half(tensor) == objection


def test_pytorch_before_the_function_is_told(monkeypatch):
    monkeypatch.setattr(attention_varlen, "find_spec", lambda _: None)
    assert "it came with 2.10" in attention_varlen.why_unavailable.__wrapped__()
