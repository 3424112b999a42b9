"""The Triton kernels of the cross-attention pooling against fp64 truth; interpreted where there is no GPU."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import PoolWeights, cross_attention_pool, cross_pool_tiled
from cosmos_kernels import pool_backward_triton, pool_triton, reference, triton_support
from tests.kernels.truth import Outcome, assert_no_worse, outcome

DTYPES = [
    pytest.param(
        torch.float32, marks=pytest.mark.skipif(not triton_support.INTERPRETED, reason="fp32 is left to the library")
    ),
    torch.bfloat16,
    torch.float16,
]
# batch, views, tokens, channels, heads
SHAPES = [
    (2, 8, 77, 32, 4),
    (1, 8, 196, 48, 8),
    (3, 1, 1, 32, 2),
    (2, 3, 12, 100, 4),
    (1, 7, 77, 100, 5),
    (1, 2, 12, 512, 8),
    (7, 5, 12, 48, 3),
    (1, 8, 20, 33, 11),
]
MANY = [(64, 4, 2, 32, 2), (130, 6, 12, 32, 2)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, size: float = 1.0) -> dict[str, Tensor]:
    batch, views, length, dim, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes: int, around: float = 0.0, width: float = 1.0) -> Tensor:
        return (around + width * torch.randn(*sizes, generator=generator)).to(device, dtype)

    return {
        "tokens_BLD": normal(batch, length, dim, width=size),
        "queries_BVD": normal(batch, views, dim),
        "ln_q_weight": normal(dim, around=1.0, width=0.1),
        "ln_q_bias": normal(dim, width=0.1),
        "ln_k_weight": normal(dim, around=1.0, width=0.1),
        "ln_k_bias": normal(dim, width=0.1),
        "in_proj_weight": normal(3 * dim, dim, width=1.5 * dim**-0.5),
        "in_proj_bias": normal(3 * dim, width=0.1),
        "out_proj_weight": normal(dim, dim, width=dim**-0.5),
        "out_proj_bias": normal(dim, width=0.1),
    }


def _pool(tokens_BLD: Tensor, queries_BVD: Tensor, heads: int, backend: str, **parameters: Tensor) -> Tensor:
    return cross_attention_pool(tokens_BLD, queries_BVD, PoolWeights(**parameters, heads=heads), backend=backend)


def _check(inputs: dict[str, Tensor], heads: int, without_gradient: tuple[str, ...] = ()) -> Outcome:
    judged = partial(outcome, inputs=inputs, without_gradient=without_gradient)
    oracle = partial(reference.cross_attention_pool, heads=heads)
    found = judged(partial(_pool, heads=heads, backend="triton"))
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in found.gradients.items())
    # fp32 is interpreted only, to check the formulas. The LayerNorm after the product costs it a few roundings: the
    # largest deviation of a gradient is up to 3.8 times eager's, at most 4 units beyond three times.
    extra = 8 * torch.finfo(torch.float32).eps if inputs["tokens_BLD"].dtype == torch.float32 else 0.0
    assert_no_worse(found, judged(oracle), judged(oracle, dtype=torch.float64), extra_floor=extra)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient(shape, dtype, device):
    _check(_inputs(shape, dtype, device), shape[4])


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_samples(shape, device):
    """With more than a hundred the forward pass alone: the interpreter takes 10 ms a sample and kernel."""
    inputs = _inputs(shape, torch.float16, device)
    _check(inputs, shape[4], without_gradient=tuple(inputs) if shape[0] > 100 else ())


@pytest.mark.long
def test_gradients_of_many_samples(device):
    _check(_inputs(MANY[-1], torch.float16, device), MANY[-1][4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, 1e-2])
def test_tokens_of_any_size(size, dtype, device):
    """1 / std of 1e-4 times a weight, or a gradient of that size, is below what fp16 can hold."""
    _check(_inputs((2, 8, 12, 48, 4), dtype, device, size), 4)


def test_tokens_of_very_different_sizes_in_one_sample(device):
    inputs = _inputs((1, 8, 12, 48, 4), torch.float16, device)
    inputs["tokens_BLD"][:, ::2] *= 2000
    _check(inputs, 4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_mean_far_from_zero_cancels(dtype, device):
    """Scores and sums lose the mean of the tokens only after the product with them."""
    inputs = _inputs((2, 8, 12, 48, 4), dtype, device)
    inputs["tokens_BLD"] += 30
    _check(inputs, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 40, 70, 130])
def test_stages_with_any_number_of_rows(rows, dtype, device):
    """One block of rows, two, and more than a program holds, with gradients far below what fp16 holds as a product."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 30, 40, device=device).to(dtype)
    queries = torch.randn(2, rows, 40, device=device).to(dtype)
    grad = (2e-3 * torch.randn(2, rows, 40, device=device)).to(dtype)
    grad[:, rows // 2 :] *= 2**-6  # blocks of one sample need not be alike
    found = dict(enumerate(pool_triton.attend(tokens, queries)))
    eager = dict(enumerate(cross_pool_tiled.attend(tokens, queries)))
    truth = dict(enumerate(cross_pool_tiled.attend(tokens.double(), queries.double())))
    _assert_close(found, eager, truth)
    lse = truth[1].float()
    backward = pool_triton.attend_backward(tokens, queries, lse, grad)
    eager_backward = cross_pool_tiled.attend_backward(tokens, queries, lse, grad)
    truth_backward = cross_pool_tiled.attend_backward(tokens.double(), queries.double(), truth[1], grad.double())
    _assert_close(*(dict(enumerate(found)) for found in (backward, eager_backward, truth_backward)))


def _assert_close(found: dict[int, Tensor], eager: dict[int, Tensor], truth: dict[int, Tensor]) -> None:
    named = ({str(i): tensor for i, tensor in side.items()} for side in (found, eager, truth))
    assert_no_worse(*(Outcome({}, side) for side in named))


@pytest.mark.parametrize(("length", "rows"), [(196, [32, 32]), (128, [64])])
def test_a_gpu_with_little_shared_memory_takes_fewer_rows_of_long_samples(length, rows, device, monkeypatch):
    """What a block of A10, L4 and RTX 4090 has, 99 KiB, does not hold 64 rows beside 256 tokens."""
    taken: list[int] = []
    attend_backward = pool_backward_triton._attend_backward

    def counted(tokens: Tensor, queries: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taken.append(queries.shape[1])
        return attend_backward(tokens, queries, *others)

    monkeypatch.setattr(pool_backward_triton, "_attend_backward", counted)
    monkeypatch.setattr(triton_support, "shared_bytes", lambda _: triton_support.MAX_SHARED_BYTES[89])
    _check(_inputs((1, 8, length, 48, 8), torch.bfloat16, device), 8)
    assert taken == rows


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"major": 8, "minor": 9, "shared_memory_per_block_optin": 101_376}, 101_376),
        ({"major": 9, "minor": 9, "shared_memory_per_block_optin": 50_000}, 50_000),
        ({"major": 8, "minor": 0}, 166_912),
        ({"major": 8, "minor": 6}, 101_376),
        ({"major": 12, "minor": 0}, 101_376),
    ],
    ids=str,
)
def test_shared_memory_is_what_the_device_says_or_the_least_there_is(properties, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    assert triton_support.shared_bytes.__wrapped__(torch.device("cuda")) == expected


def test_strided_tokens(device):
    shape = (2, 3, 12, 48, 4)
    inputs = _inputs(shape, torch.float16, device)
    expected = _check(inputs, 4)
    length_first = inputs["tokens_BLD"].transpose(0, 1).contiguous().transpose(0, 1)
    every_second = torch.stack([inputs["tokens_BLD"]] * 2, -1).flatten(2)[..., ::2]
    for strided in (length_first, every_second):
        assert not strided.is_contiguous()
        found = outcome(partial(_pool, heads=4, backend="triton"), {**inputs, "tokens_BLD": strided})
        assert torch.equal(found.outputs["output 0"], expected.outputs["output 0"])
        assert torch.equal(found.gradients["tokens_BLD"], expected.gradients["tokens_BLD"])


def test_identical_tokens_get_identical_weights(device):
    """No spread within a token either: eps alone keeps 1 / std finite."""
    inputs = _inputs((1, 4, 12, 32, 4), torch.float16, device)
    inputs["tokens_BLD"] = torch.full_like(inputs["tokens_BLD"], 3.0)
    _check(inputs, 4)


def test_nan_comes_out_where_it_went_in(device):
    inputs = _inputs((3, 2, 12, 32, 4), torch.float16, device)
    inputs["tokens_BLD"][1, 5, 7] = float("nan")
    found = outcome(partial(_pool, heads=4, backend="triton"), inputs)
    assert found.outputs["output 0"].isnan().all(-1).all(-1).tolist() == [False, True, False]
    assert found.gradients["tokens_BLD"].isnan().any(-1).any(-1).tolist() == [False, True, False]


def test_compiles_without_graph_breaks(device):
    inputs = _inputs((2, 3, 12, 32, 4), torch.float16, device)
    pool = partial(_pool, heads=4, backend="triton")
    compiled = outcome(torch.compile(pool, fullgraph=True, backend="aot_eager"), inputs)
    plain = outcome(pool, inputs)
    assert torch.equal(compiled.outputs["output 0"], plain.outputs["output 0"])
    assert torch.equal(compiled.gradients["tokens_BLD"], plain.gradients["tokens_BLD"])


def test_custom_ops_keep_their_contracts(device):
    inputs = _inputs((2, 3, 12, 32, 4), torch.float16, device)
    tokens, queries, *parameters = (tensor.requires_grad_() for tensor in inputs.values())
    arguments = tokens, queries, parameters, 4, "triton"
    torch.library.opcheck(torch.ops.cosmos_fast.cross_attention_pool.default, arguments)


@pytest.mark.parametrize(
    ("length", "dtype", "reason"),
    [(257, torch.float16, "257 tokens, it takes at most 256"), (12, torch.float64, "tokens in torch.float64")],
)
def test_what_it_does_not_take_is_refused_with_the_reason(length, dtype, reason, device):
    inputs = _inputs((1, 2, length, 32, 4), dtype, device)
    with pytest.raises(ValueError, match=f"'triton' was asked for but cannot run: {reason}"):
        _pool(**inputs, heads=4, backend="triton")
    assert _pool(**inputs, heads=4, backend="auto").shape == (1, 2, 32)
