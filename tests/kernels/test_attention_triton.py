"""The Triton kernels of packed attention against fp64 truth; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos_kernels import attention_backward_triton, attention_parts, attention_triton, reference, triton_support
from tests.kernels.truth import Outcome, assert_no_worse, outcome

DTYPES = [
    pytest.param(
        torch.float32, marks=pytest.mark.skipif(not triton_support.INTERPRETED, reason="fp32 is left to the library")
    ),
    torch.bfloat16,
    torch.float16,
]


class Stages(torch.autograd.Function):
    """Both stages as one differentiable function of a [T, 3, H, d] matrix, or of queries and keys with values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, arguments: tuple, options: dict) -> tuple[Tensor, Tensor]:
        out, lse = attention_triton.forward(q, k, v, *arguments, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.arguments, ctx.options = arguments, options
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*attention_triton.backward(grad, *ctx.saved_tensors, *ctx.arguments, **ctx.options), None, None)


def _kernels(qkv: Tensor, queries: Sequence[int], causal: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """Queries, keys and values as views of the packed matrix, as the towers have them."""
    cu = torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=qkv.device)
    return Stages.apply(*qkv.unbind(1), (cu, cu, max(queries), max(queries), causal), options)


def _pruned(q: Tensor, kv: Tensor, keys: Sequence[int], causal: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """One query a sequence."""
    cu_queries = torch.arange(len(keys) + 1, dtype=torch.int32, device=q.device)
    cu_keys = torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=q.device)
    return Stages.apply(q, *kv.unbind(1), (cu_queries, cu_keys, 1, max(keys), causal), options)


def _draw(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _check(function: Any, oracle: Any, inputs: dict[str, Tensor]) -> Outcome:
    """Within the usual factors of eager; log-sum-exps are fp32 whatever the inputs, so within fp32's rounding."""

    def split(found: Outcome) -> tuple[Outcome, Tensor]:
        return Outcome({"out": found.outputs["output 0"]}, found.gradients), found.outputs["output 1"]

    def oracle_in(dtype: torch.dtype | None) -> Outcome:
        return outcome(_no_gradient_of_lse(oracle), inputs, dtype)

    found, lse = split(outcome(function, inputs))
    eager, _ = split(oracle_in(None))
    truth, true_lse = split(oracle_in(torch.float64))
    assert found.outputs["out"].dtype == next(iter(inputs.values())).dtype
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in found.gradients.items())
    # fp32 is interpreted only, to check the formulas: exponentials to base 2 cost it a rounding, which one query's
    # gradient shows, up to 3.4 times eager's.
    extra = 1e-6 if found.outputs["out"].dtype == torch.float32 else 0.0
    assert_no_worse(found, eager, truth, extra_floor=extra, lucky=("kv",))
    torch.testing.assert_close(lse.double().cpu(), true_lse.cpu(), rtol=1e-5, atol=1e-5)
    return found


def _no_gradient_of_lse(oracle: Any) -> Any:
    def call(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = oracle(**inputs)
        return out, lse.detach()

    return call


def _full_oracle(qkv: Tensor, queries: Sequence[int], causal: bool) -> tuple[Tensor, Tensor]:
    return reference.packed_attention(*qkv.unbind(1), queries, queries, causal)


def _pruned_oracle(q: Tensor, kv: Tensor, keys: Sequence[int], causal: bool) -> tuple[Tensor, Tensor]:
    return reference.packed_attention(q, *kv.unbind(1), [1] * len(keys), keys, causal)


def _check_full(
    lengths: Sequence[int], heads: int, dim: int, causal: bool, dtype: torch.dtype, device: str, **options: Any
) -> Outcome:
    inputs = {"qkv": _draw(sum(lengths), 3, heads, dim, dtype=dtype, device=device)}
    same = {"queries": lengths, "causal": causal}
    return _check(partial(_kernels, **same, **options), partial(_full_oracle, **same), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (12,) * 7, (37,) * 4, (77, 77), (197,), (77, 1, 37, 12, 60)], ids=str)
def test_output_and_gradients(lengths, causal, dtype, device):
    _check_full(lengths, 2, 64, causal, dtype, device)


@pytest.mark.parametrize("dim", [16, 24, 32, 48, 96, 128])
def test_any_width_of_a_head(dim, device):
    _check_full((37, 37, 20), 3, dim, False, torch.float16, device)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("lengths", [(150, 20), (30, 37, 20)], ids=str)
def test_queries_of_wide_heads_are_cut_into_blocks(lengths, arch, causal, device, monkeypatch):
    """Gradients of keys and values come from several programs, some of which have no query of a short sequence."""
    monkeypatch.setattr(attention_backward_triton, "architecture", lambda _: arch)
    _check_full(lengths, 1, 96, causal, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [(37,) * 4, (197,), (5, 77, 39), (12,) * 11], ids=str)
def test_one_query_a_sequence(keys, causal, dtype, device):
    inputs = {
        "q": _draw(len(keys), 2, 64, dtype=dtype, device=device),
        "kv": _draw(sum(keys), 2, 2, 64, dtype=dtype, device=device),
    }
    same = {"keys": keys, "causal": causal}
    _check(partial(_pruned, **same), partial(_pruned_oracle, **same), inputs)


@pytest.mark.parametrize("share", [1, 2, 3])
def test_any_number_of_sequences_a_program(share, device):
    """Seven sequences: the last program is not full."""
    _check_full((37, 20, 37, 30, 1, 36, 37), 2, 32, True, torch.float16, device, sequences_per_program=share)


def test_large_scores(device):
    """Scores of several hundred: what is left of a row after its largest is far below what fp16 holds."""
    inputs = {"qkv": 8 * _draw(40, 3, 2, 64, dtype=torch.float16, device=device)}
    same = {"queries": (40,), "causal": True}
    _check(partial(_kernels, **same), partial(_full_oracle, **same), inputs)


def test_groups_of_one_length_are_launched_with_tiles_that_fit(device, monkeypatch):
    lengths = (77, 77, 12, 12, 12, 14, 37, 37)
    seen = []
    options = attention_triton.forward_options
    monkeypatch.setattr(attention_triton, "forward_options", lambda *args: seen.append(args[:2]) or options(*args))
    groups = [(2, 77), (3, 12), (1, 14), (2, 37)]
    runs = attention_parts.runs(groups, groups)
    found = _check_full(lengths, 2, 32, True, torch.float16, device, runs=runs)
    assert seen == [(77, 77), (14, 14), (37, 37)]
    one_launch = _check_full(lengths, 2, 32, True, torch.float16, device)
    assert torch.equal(found.outputs["out"], one_launch.outputs["out"])


def test_runs_of_sequences():
    Run = attention_parts.Run
    assert attention_parts.runs([(8, 197), (24, 37)], [(8, 197), (24, 37)]) == [Run(0, 8, 197, 197), Run(8, 24, 37, 37)]
    # Pruned: one query each, whatever the number of keys; and groups that do not begin together.
    assert attention_parts.runs([(5, 1)], [(2, 37), (1, 50), (2, 12)]) == [Run(0, 3, 1, 50), Run(3, 2, 1, 12)]
    assert attention_parts.runs([(2, 77), (4, 1)], [(4, 77), (2, 70)]) == [Run(0, 2, 77, 77), Run(2, 4, 1, 77)]
    assert attention_parts.runs([], []) == []


def test_how_many_sequences_share_a_program():
    assert attention_parts.sharing(37, 37) == 3
    assert attention_parts.sharing(64, 64) == attention_parts.sharing(77, 77) == attention_parts.sharing(197, 197) == 1
    assert attention_parts.sharing(1, 37) == 3
    assert attention_parts.sharing(12, 12) > 1
    for length in range(1, 129):
        assert attention_parts.sharing(length, length) * length <= attention_parts.MAX_TILE


def test_strided_inputs_are_read_where_they_lie(device):
    heads_first = _draw(2, 49, 32, dtype=torch.float16, device=device).transpose(0, 1)
    every_second = _draw(49, 2, 64, dtype=torch.float16, device=device)[..., ::2]
    cu = torch.tensor([0, 37, 49], dtype=torch.int32, device=device)
    arguments = (cu, cu, 37, 37, False)
    inputs = heads_first, every_second, heads_first
    grad = _draw(49, 2, 1, dtype=torch.float16, device=device).expand(-1, -1, 32)
    found = attention_triton.forward(*inputs, *arguments)
    expected = attention_triton.forward(*(x.contiguous() for x in inputs), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    gradients = attention_triton.backward(grad, *inputs, *found, *arguments)
    same = attention_triton.backward(grad.contiguous(), *(x.contiguous() for x in inputs), *found, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_heads_that_lie_too_far_apart_are_copied():
    """The offset of the last head must fit 32 bits: [H, T, d] seen as [T, H, d], with many tokens."""
    near, far = (torch.empty_strided((4, 12, 8), (8, apart, 1), device="meta") for apart in (2**27, 2**28))
    assert attention_parts.readable(near) is near
    assert attention_parts.readable(far).is_contiguous()


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80), ((13, 0), 80)],
    ids=str,
)
def test_every_gpu_has_tiles_even_one_that_is_not_known(capability, tiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_parts.architecture.__wrapped__(torch.device("cuda")) == tiles


def test_the_same_bits_every_time(device):
    found = [_check_full((37,) * 4, 2, 64, False, torch.bfloat16, device) for _ in range(2)]
    assert torch.equal(found[0].outputs["out"], found[1].outputs["out"])
    assert torch.equal(found[0].gradients["qkv"], found[1].gradients["qkv"])


def test_nan_comes_out_of_the_sequence_it_went_into(device):
    qkv = _draw(150, 3, 2, 32, dtype=torch.float16, device=device)
    qkv[80, 2, 1, 3] = float("nan")
    found = outcome(partial(_kernels, queries=(70, 80), causal=False), {"qkv": qkv})
    bad_rows = found.outputs["output 0"].isnan().flatten(1).any(1)
    assert bad_rows.tolist() == [False] * 70 + [True] * 80
    assert found.gradients["qkv"].isnan().flatten(1).any(1).tolist() == bad_rows.tolist()


def test_a_query_that_sees_nothing_gives_zero(device):
    """More queries than keys under a causal mask: the first ones see none."""
    q, kv = _draw(5, 1, 16, dtype=torch.float16, device=device), _draw(3, 2, 1, 16, dtype=torch.float16, device=device)
    cu_queries, cu_keys = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (5, 3))
    arguments = (cu_queries, cu_keys, 5, 3, True)
    out, lse = attention_triton.forward(q, *kv.unbind(1), *arguments)
    assert out[:2].eq(0).all()
    assert out[2:].ne(0).all()
    gradients = attention_triton.backward(torch.ones_like(out), q, *kv.unbind(1), out, lse, *arguments)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][:2].eq(0).all()


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [
        (129, torch.float16, "heads of 129 channels, it takes at most 128"),
        (64, torch.float64, "queries in torch.float64"),
    ],
)
def test_what_it_does_not_take_has_a_reason(dim, dtype, reason, device):
    tensor = torch.zeros(4, 1, dim, dtype=dtype, device=device)
    assert reason in attention_parts.why_unsupported(tensor, tensor, tensor)
    assert attention_parts.why_unsupported(*[tensor[..., :64].half()] * 3) is None


def test_sequences_that_are_too_long_have_a_reason():
    assert attention_parts.why_too_long(1, 257) == "sequences of 257 tokens, it takes at most 256"
    assert attention_parts.why_too_long(256, 256) is None


@pytest.mark.parametrize(("shared_bytes", "refused"), [(101_376, True), (166_912, False)])
def test_long_keys_with_wide_heads_are_refused_where_shared_memory_is_small(shared_bytes, refused, monkeypatch):
    monkeypatch.setattr(triton_support, "shared_bytes", lambda _: shared_bytes)
    wide, narrow = (torch.zeros(4, 1, dim, dtype=torch.float16) for dim in (96, 64))
    reason = attention_parts.why_too_long(197, 197, wide)
    assert (reason is not None) == refused
    assert reason is None or reason.startswith("sequences of 197 tokens with heads of 96 channels: on this GPU")
    assert attention_parts.why_too_long(197, 197, narrow) is None
    assert attention_parts.why_too_long(128, 128, wide) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: shapes of a whole batch")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "groups", [[(64, 197), (384, 37)], [(256, 77), (512, 39)], [(2000, 12)]], ids=["crops", "captions", "many"]
)
def test_a_batch_on_a_gpu(groups, causal, device):
    """Many programs at once, several launches, twice: against PyTorch's attention in fp32, and the same bits."""
    lengths = [length for count, length in groups for _ in range(count)]
    qkv = torch.randn(sum(lengths), 3, 12, 64, device=device).bfloat16()
    runs = attention_parts.runs(groups, groups)
    oracle = partial(_full_oracle_by_group, groups=groups, causal=causal)
    found, again = (outcome(partial(_kernels, queries=lengths, causal=causal, runs=runs), {"qkv": qkv}) for _ in "12")
    truth, eager = outcome(oracle, {"qkv": qkv}, torch.float32), outcome(oracle, {"qkv": qkv})
    assert_no_worse(Outcome({"output 0": found.outputs["output 0"]}, found.gradients), eager, truth)
    assert torch.equal(found.outputs["output 0"], again.outputs["output 0"])
    assert torch.equal(found.gradients["qkv"], again.gradients["qkv"])


def _full_oracle_by_group(qkv: Tensor, groups: list[tuple[int, int]], causal: bool) -> Tensor:
    outputs = []
    for part, (count, length) in zip(qkv.split([count * length for count, length in groups]), groups, strict=True):
        q, k, v = part.view(count, length, *part.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
