"""Attention of csrc/attention_cpu.cpp beyond what every backend is held to: layouts, threads, scores, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops.attention import Sequences, choose_attention, packed_attention
from cosmos_fast.utils.errors import UserError
from cosmos_kernels import attention_native, native

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason=str(native.why_missing("cpu")))
LENGTHS = [37, 1, 10, 8, 23, 5, 6, 7]


def parts(lengths: list[int] = LENGTHS, heads: int = 3, width: int = 24) -> list[Tensor]:
    """Queries, keys and values, views of one matrix."""
    torch.manual_seed(0)
    return [part.requires_grad_() for part in torch.randn(sum(lengths), 3, heads, width).unbind(1)]


def results(qkv: list[Tensor], lengths: list[int] = LENGTHS, causal: bool = False, backend: str = "native"):
    out = packed_attention(*qkv, Sequences.from_lengths(lengths), causal=causal, backend=backend)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, qkv, torch.randn(out.shape).to(out))]


@pytest.mark.parametrize("causal", [False, True])
def test_the_number_of_threads_changes_no_bit(causal):
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(parts(), causal=causal))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


def test_any_layout_gives_the_same():
    expected = results(parts())
    by_channel = [part.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for part in parts()]
    assert by_channel[0].stride(2) != 1
    every_second = [part.detach().repeat_interleave(2, 0)[::2].requires_grad_() for part in parts()]
    for qkv in (by_channel, every_second):
        for ours, theirs in zip(results(qkv), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_an_expanded_gradient_is_read_as_it_is():
    qkv = parts()
    out = packed_attention(*qkv, Sequences.from_lengths(LENGTHS), causal=False, backend="native")
    summed = torch.autograd.grad(out.sum(), qkv, retain_graph=True)  # a gradient of strides 0
    for ours, theirs in zip(summed, torch.autograd.grad(out, qkv, torch.ones_like(out)), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_lie_in_one_matrix():
    """So that the projection's gradient needs no copy."""
    q, k, v = (part.detach() for part in parts())
    bounds = Sequences.from_lengths(LENGTHS).cu_queries
    out, lse = attention_native.forward(q, k, v, bounds, bounds, False)
    grads = attention_native.backward(torch.ones_like(out), q, k, v, lse, bounds, bounds, False)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
    assert [grad.storage_offset() for grad in grads] == [0, 72, 144]


def test_log_sum_exp_of_every_row():
    q, k, v = (part.detach() for part in parts([9]))
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    _, lse = attention_native.forward(q, k, v, bounds, bounds, True)
    scores = torch.einsum("ihd,jhd->hij", q, k).double() / 24**0.5
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.T.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e3])
def test_tiny_and_large_scores(size):
    qkv = [(part.detach() * scale).requires_grad_() for part, scale in zip(parts(), (size, 1.0, 1.0), strict=True)]
    truth = results([part.detach().double().requires_grad_() for part in qkv], backend="sdpa")
    # A weight is as exact as its score, of which only the part behind the point counts.
    largest_score = max(1.0, 4 * size)
    for ours, exact in zip(results(qkv), truth, strict=True):
        error = (ours - exact).abs().max() / exact.abs().max()
        assert error <= 4 * torch.finfo(torch.float32).eps * largest_score


def test_scores_far_beyond_the_range_of_exp():
    """Each query takes the value of its best key alone, and nothing overflows."""
    q, k, v = (part.detach() for part in parts())
    qkv = [(q * 1e15).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    exact = packed_attention(q.double() * 1e15, k.double(), v.double(), Sequences.from_lengths(LENGTHS), causal=False)
    found, *grads = results(qkv)
    torch.testing.assert_close(found, exact.detach().float(), rtol=1e-6, atol=0)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head_and_sequence(value):
    qkv = [part.detach().clone() for part in parts()]
    qkv[1][40, 1, 3] = value  # of the third sequence
    for ours in results([part.requires_grad_() for part in qkv]):
        bad = ~ours.isfinite().all(-1)
        assert bad[38:48, 1].any()
        bad[38:48, 1] = False
        assert not bad.any()
    out = packed_attention(*qkv, Sequences.from_lengths(LENGTHS), causal=False, backend="native")
    assert out[38:48, 1].isnan().any(-1).all() if value != value else out[38:48, 1].isnan().any()


def choose(request: str = "auto", **changes: object) -> str:
    options = {"tokens": 100, "longest": 37, "heads": 2, "width": 16, "dtype": torch.float32}
    return choose_attention(request, **{**options, "device": torch.device("cpu"), **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "fp32 only, not float64"),
        ({"dtype": torch.bfloat16}, "fp32 only, not bfloat16"),
        ({"width": 12}, "head width 12 is not a multiple of 8"),
        ({"longest": 513}, "sequences of at most 512 tokens, not 513"),
        ({"device": torch.device("meta")}, "CPU only"),
    ],
)
def test_what_it_does_not_take_is_told_and_left_to_others(changes, reason):
    assert choose() == "native"
    assert choose(**changes) == "sdpa"
    with pytest.raises(UserError, match=f"backend 'native' was asked for but cannot run: {reason}"):
        choose("native", **changes)


def test_without_its_library_others_run(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda kind: f"no {kind} library")
    assert choose() == "sdpa"
    with pytest.raises(UserError, match="no cpu library"):
        choose("native")
