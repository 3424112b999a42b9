"""Absorbed cross-attention pooling against the oracle that repeats keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosmos_fast.ops import PoolWeights, attention_weights, cross_attention_pool


def _weights(dim: int, heads: int, dtype: torch.dtype = torch.float64) -> PoolWeights:
    def tensor(*shape: int, around: float = 0.0) -> torch.Tensor:
        return (around + 0.3 * torch.randn(*shape, dtype=dtype)).requires_grad_()

    return PoolWeights(
        ln_q_weight=tensor(dim, around=1.0),
        ln_q_bias=tensor(dim),
        ln_k_weight=tensor(dim, around=1.0),
        ln_k_bias=tensor(dim),
        in_proj_weight=tensor(3 * dim, dim),
        in_proj_bias=tensor(3 * dim),
        out_proj_weight=tensor(dim, dim),
        out_proj_bias=tensor(dim),
        heads=heads,
    )


def _leaves(weights: PoolWeights) -> list[torch.Tensor]:
    return [value for value in vars(weights).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("batch", "views", "length", "dim", "heads"), [(3, 8, 7, 16, 4), (1, 1, 1, 8, 8), (5, 2, 77, 24, 2)]
)
def test_equals_the_oracle_with_every_gradient(batch, views, length, dim, heads):
    torch.manual_seed(0)
    tokens = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(batch, views, dim, dtype=torch.float64, requires_grad=True)
    weights = _weights(dim, heads)
    inputs = [tokens, queries, *_leaves(weights)]
    outputs = [cross_attention_pool(tokens, queries, weights, backend=name) for name in ("eager", "absorbed")]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs[1].norm(dim=-1), torch.ones(batch, views, dtype=torch.float64))
    direction = torch.randn_like(outputs[0])
    for name, ours, theirs in zip(
        ["tokens", "queries", *(key for key, value in vars(weights).items() if isinstance(value, torch.Tensor))],
        torch.autograd.grad(outputs[1], inputs, direction),
        torch.autograd.grad(outputs[0], inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_key_bias_gets_exactly_no_gradient():
    """It shifts all scores of a query alike; an implementation that forms K leaves rounding noise there."""
    torch.manual_seed(0)
    weights = _weights(8, 2, torch.float32)
    cross_attention_pool(torch.randn(2, 5, 8), torch.randn(2, 3, 8), weights).sum().backward()
    assert weights.in_proj_bias.grad is not None
    assert torch.equal(weights.in_proj_bias.grad[8:16], torch.zeros(8))
    assert weights.in_proj_bias.grad[16:].abs().min() > 0


def test_gradcheck():
    torch.manual_seed(0)
    weights = _weights(4, 2)
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, q: cross_attention_pool(t, q, weights), (tokens, queries))


def test_attention_weights_are_those_of_multihead_attention():
    torch.manual_seed(0)
    weights, dim, heads = _weights(12, 3), 12, 3
    tokens, queries = torch.randn(2, 5, dim, dtype=torch.float64), torch.randn(2, 4, dim, dtype=torch.float64)
    attention = nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(weights.in_proj_weight)
        attention.in_proj_bias.copy_(weights.in_proj_bias)
    keys = nn.functional.layer_norm(tokens, (dim,), weights.ln_k_weight, weights.ln_k_bias)
    normed = nn.functional.layer_norm(queries, (dim,), weights.ln_q_weight, weights.ln_q_bias)
    _, expected = attention(normed, keys, keys, average_attn_weights=False)
    torch.testing.assert_close(attention_weights(tokens, queries, weights), expected.transpose(1, 2))


def test_autocast_stays_close_to_fp32():
    torch.manual_seed(0)
    weights = _weights(32, 4, torch.float32)
    tokens, queries = torch.randn(3, 9, 32), torch.randn(3, 8, 32)
    exact = cross_attention_pool(tokens, queries, weights)
    with torch.autocast("cpu", torch.bfloat16):
        rough = cross_attention_pool(tokens, queries, weights)
        eager = cross_attention_pool(tokens, queries, weights, backend="eager")
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() <= 2 * (eager - exact).norm() + 1e-6


@pytest.mark.parametrize(
    ("tokens", "queries", "heads", "message"),
    [
        ((2, 5, 8), (3, 4, 8), 2, r"tokens_BLD has shape \(2, 5, 8\), expected \[3, L, 8\]"),
        ((2, 0, 8), (2, 4, 8), 2, "non-empty"),
        ((2, 5, 8), (2, 8), 2, "queries_BVD has shape"),
        ((2, 5, 6), (2, 4, 6), 2, r"in_proj_weight has shape \(24, 8\), expected \(18, 6\)"),
        ((2, 5, 8), (2, 4, 8), 3, "heads = 3 does not divide D = 8"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tokens, queries, heads, message):
    weights = PoolWeights(**{**vars(_weights(8, 2)), "heads": heads})
    with pytest.raises(ValueError, match=message):
        cross_attention_pool(torch.randn(*tokens), torch.randn(*queries), weights)
