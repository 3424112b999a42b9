"""Absorbed cross-attention pooling against the oracle that repeats keys and values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cosmos_fast.ops import PoolWeights, attention_weights, cross_attention_pool, cross_pool_tiled
from cosmos_kernels import reference
from tests.kernels.truth import assert_no_worse, outcome

WITHOUT_AUTOGRAD = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


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
    return list(weights.parameters)


def _with(weights: PoolWeights, parameters) -> PoolWeights:
    return PoolWeights(**dict(zip(weights.parameters._fields, parameters, strict=True)), heads=weights.heads)


@pytest.mark.parametrize(
    ("batch", "views", "length", "dim", "heads"), [(3, 8, 7, 16, 4), (1, 1, 1, 8, 8), (5, 2, 77, 24, 2)]
)
def test_equals_the_oracle_with_every_gradient(batch, views, length, dim, heads):
    torch.manual_seed(0)
    tokens = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(batch, views, dim, dtype=torch.float64, requires_grad=True)
    weights = _weights(dim, heads)
    inputs = [tokens, queries, *_leaves(weights)]
    outputs = [cross_attention_pool(tokens, queries, weights, backend=name) for name in ("eager", "tiled")]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs[1].norm(dim=-1), torch.ones(batch, views, dtype=torch.float64))
    direction = torch.randn_like(outputs[0])
    for name, ours, theirs in zip(
        ["tokens", "queries", *weights.parameters._fields],
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


def test_gradcheck_of_inputs_and_every_parameter():
    torch.manual_seed(0)
    weights = _weights(4, 2)
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    inputs = (tokens, queries, *_leaves(weights))

    def pool(tokens, queries, *parameters):
        return cross_attention_pool(tokens, queries, _with(weights, parameters))

    assert torch.autograd.gradcheck(pool, inputs)


def test_samples_do_not_depend_on_the_tile_they_fall_in(monkeypatch):
    torch.manual_seed(0)
    weights, tokens, queries = _weights(8, 2), torch.randn(5, 3, 8).double(), torch.randn(5, 2, 8).double()
    found = []
    for tile_bytes in (1, 2 * 3 * 8 * 8, 1 << 20):  # one sample, two, all
        monkeypatch.setitem(cross_pool_tiled.TILE_BYTES, "cpu", tile_bytes)
        leaves = tokens.clone().requires_grad_(), queries.clone().requires_grad_(), *_leaves(weights)
        output = cross_attention_pool(*leaves[:2], weights)
        found.append((output, *torch.autograd.grad(output.square().cumsum(0).sum(), leaves)))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_saves_nothing_larger_than_the_tokens():
    """Inputs, output, norms, log-sum-exps: of the keys, values and scores nothing is kept."""
    weights = _weights(16, 4, torch.float32)
    tokens, queries = torch.randn(3, 20, 16, requires_grad=True), torch.randn(3, 2, 16, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = cross_attention_pool(tokens, queries, weights)
    inputs = sum(tensor.numel() for tensor in (tokens, queries, *_leaves(weights)))
    assert sum(saved.values()) == inputs + output.numel() + 3 * 2 + 3 * 2 * 4


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


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_autocast_changes_nothing(backend):
    """What the tokens' dtype is, not whether autocast is on, decides the dtype of the products."""
    torch.manual_seed(0)
    weights = _weights(32, 4, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        tokens, queries = torch.randn(3, 9, 32).to(dtype).requires_grad_(), torch.randn(3, 8, 32)
        plain = cross_attention_pool(tokens, queries, weights, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = cross_attention_pool(tokens, queries, weights, backend=backend)
            grad_under_autocast = torch.autograd.grad(under_autocast.cumsum(-1).sum(), tokens)[0]
        assert under_autocast.dtype == torch.float32
        assert torch.equal(under_autocast, plain)
        assert torch.equal(grad_under_autocast, torch.autograd.grad(plain.cumsum(-1).sum(), tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e-4])
def test_low_precision_is_no_worse_than_the_oracle(dtype, size):
    torch.manual_seed(0)
    inputs = {"tokens_BLD": size * torch.randn(2, 12, 32), "queries_BVD": torch.randn(2, 8, 32)}
    inputs |= _weights(32, 4).parameters._asdict()
    inputs = {name: value.detach().to(dtype) for name, value in inputs.items()}

    def pool(tokens_BLD, queries_BVD, **parameters):
        return cross_attention_pool(tokens_BLD, queries_BVD, PoolWeights(**parameters, heads=4), backend="tiled")

    oracle = partial(reference.cross_attention_pool, heads=4)
    assert_no_worse(outcome(pool, inputs), outcome(oracle, inputs), outcome(oracle, inputs, torch.float64))


def test_custom_ops_keep_their_contracts():
    torch.manual_seed(0)
    weights = _weights(8, 2, torch.float32)
    tokens, queries = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    arguments = (tokens, queries, _leaves(weights), 2, "tiled")
    op = torch.ops.cosmos_fast.cross_attention_pool.default
    torch.library.opcheck(op, arguments)
    with torch.no_grad():
        output, norms, lse = op(*arguments)
        detached = tokens.detach(), queries.detach(), [leaf.detach() for leaf in _leaves(weights)], 2, "tiled"
        backward = torch.randn_like(output), output, norms, lse, *detached
    torch.library.opcheck(
        torch.ops.cosmos_fast.cross_attention_pool_backward.default, backward, test_utils=WITHOUT_AUTOGRAD
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype):
    torch.manual_seed(0)
    weights = _weights(8, 2, torch.float32)
    tokens, queries = torch.randn(2, 5, 8).to(dtype).requires_grad_(), torch.randn(2, 3, 8, requires_grad=True)

    def loss(tokens, queries):
        return cross_attention_pool(2 * tokens, queries, weights).square().cumsum(-1).sum()

    inputs = [tokens, queries, *_leaves(weights)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(tokens, queries)
        plain = loss(tokens, queries)
    for ours, theirs in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nan_comes_out_where_it_went_in():
    weights = _weights(8, 2, torch.float32)
    tokens, queries = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 2, 8)
    with torch.no_grad():
        tokens[1, 2, 3] = float("nan")
    output = cross_attention_pool(tokens, queries, weights)
    output.sum().backward()
    assert output.isnan().all(-1).all(-1).tolist() == [False, True, False]
    assert tokens.grad is not None
    assert tokens.grad.isnan().any(-1).any(-1).tolist() == [False, True, False]


def test_strided_inputs():
    torch.manual_seed(0)
    weights = _weights(8, 2)
    tokens, queries = torch.randn(5, 3, 16).double(), torch.randn(2, 8, 3).double()
    strided = tokens.transpose(0, 1)[..., ::2], queries.permute(2, 0, 1)
    expected = cross_attention_pool(*(x.contiguous() for x in strided), weights, backend="eager")
    torch.testing.assert_close(cross_attention_pool(*strided, weights), expected)


@pytest.mark.parametrize(
    ("tokens", "queries", "heads", "message"),
    [
        ((2, 5, 8), (3, 4, 8), 2, r"tokens_BLD has shape \(2, 5, 8\), expected \[3, L, 8\]"),
        ((2, 0, 8), (2, 4, 8), 2, "non-empty"),
        ((2, 5, 8), (2, 8), 2, "queries_BVD has shape"),
        ((2, 5, 6), (2, 4, 6), 2, r"ln_q_weight has shape \(8,\), expected \(6,\) for features of 6"),
        ((2, 5, 8), (2, 4, 8), 3, "heads = 3 does not divide D = 8"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tokens, queries, heads, message):
    weights = PoolWeights(**{**vars(_weights(8, 2)), "heads": heads})
    with pytest.raises(ValueError, match=message):
        cross_attention_pool(torch.randn(*tokens), torch.randn(*queries), weights)


def test_dtypes_that_do_not_go_together_are_named():
    weights = _weights(8, 2, torch.float32)
    with pytest.raises(
        ValueError, match=r"queries_BVD is torch.float64, which does not go with tokens_BLD of torch.float32"
    ):
        cross_attention_pool(torch.randn(2, 5, 8), torch.randn(2, 3, 8).double(), weights)
    with pytest.raises(ValueError, match=r"ln_q_weight is torch.float32, which does not go with"):
        cross_attention_pool(torch.randn(2, 5, 8).double(), torch.randn(2, 3, 8).double(), weights)
    with pytest.raises(ValueError, match=r"tokens_BLD is on cpu, queries_BVD on meta"):
        cross_attention_pool(torch.randn(2, 5, 8), torch.randn(2, 3, 8, device="meta"), weights)
