"""What packed attention refuses, on one line that names the argument, what it is and what was expected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import backends
from cosmos_fast.ops.attention import OP, Sequences, packed_attention
from cosmos_kernels import native, triton_support
from tests import attention_fakes

LENGTHS = [3, 5]


def heads(rows: int = 8, count: int = 2, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(3, rows, count, width).to(dtype))


def refusal(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None = None, **options: object) -> str:
    """The message, which is one line."""
    sequences = sequences or Sequences.from_lengths(LENGTHS)
    with pytest.raises(ValueError, match=f"^{OP}: ") as caught:
        packed_attention(q, k, v, sequences, **{"causal": False, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{OP}: ")


def test_rows_that_are_not_those_of_the_sequences():
    q, k, v = heads()
    assert refusal(q[:7], k, v) == "q_THd has shape (7, 2, 16), expected (8, 2, 16) for the sequences"
    assert refusal(q, k, v[:7]) == "v_SHd has shape (7, 2, 16), expected (8, 2, 16) for the sequences"
    one_query_each = Sequences.from_lengths([1, 1], LENGTHS)
    assert refusal(q, k, v, one_query_each) == "q_THd has shape (8, 2, 16), expected (2, 2, 16) for the sequences"
    assert refusal(q.flatten(1), k, v) == "q_THd has shape (8, 32), expected (8, H, d) for the sequences"


def test_heads_of_other_widths_or_numbers():
    q, k, v = heads()
    assert refusal(q, k[..., :8], v) == "k_SHd has shape (8, 2, 8), expected (8, 2, 16) for the sequences"
    assert refusal(q, k, v[:, :1]) == "v_SHd has shape (8, 1, 16), expected (8, 2, 16) for the sequences"


@pytest.mark.parametrize("backend", ["auto", "sdpa", "triton"])
def test_several_dtypes_and_devices(backend):
    q, k, v = heads()
    kind = "torch.float32 on cpu like q_THd"
    assert refusal(q, k.half(), v, backend=backend) == f"k_SHd is torch.float16 on cpu, expected {kind}"
    assert refusal(q, k, v.to("meta"), backend=backend) == f"v_SHd is torch.float32 on meta, expected {kind}"
    assert refusal(q.long(), k, v, backend=backend) == "q_THd is torch.int64, expected a floating-point type"


def test_sequences_on_another_device():
    """A kernel would read their boundaries from memory that is not there."""
    elsewhere = Sequences.from_lengths(LENGTHS, device="meta")
    assert refusal(*heads(), elsewhere) == "sequences are on meta, expected cpu like q_THd: make them with device=..."


@pytest.mark.parametrize("backend", ["sdpa", "triton", "varlen"])
def test_more_queries_than_keys_have_no_causal_mask(backend, monkeypatch):
    if backend in attention_fakes.FAKES:
        attention_fakes.use(backend, monkeypatch)
    sequences = Sequences.from_lengths([3, 5], [5, 3])
    message = refusal(*heads(), sequences, causal=True, backend=backend)
    assert message == "sequences have 5 queries for 3 keys, a causal mask needs at least as many keys"
    if backend == "sdpa":  # which is no reason to refuse full attention
        assert packed_attention(*heads(), sequences, causal=False, backend=backend).isfinite().all()


def test_sequences_that_are_none():
    none = torch.empty(0, 2, 16)
    assert refusal(none, none, none, Sequences.from_lengths([])) == "sequences are (), expected at least one"
    with pytest.raises(ValueError, match=r"key_groups \(\(1, 0\),\) has a length below 1"):
        Sequences.from_lengths([1], [0])
    with pytest.raises(ValueError, match="lengths of 1 queries and of 2 keys, expected as many of both"):
        Sequences.from_lengths([1], [1, 2])
    with pytest.raises(ValueError, match="have other counts, expected the same"):
        Sequences.from_groups([(1, 2)], [(2, 2)])


needs_native = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="CPU library not built")
needs_triton = pytest.mark.skipif(triton_support.why_missing() is not None, reason=str(triton_support.why_missing()))


@needs_triton
@pytest.mark.parametrize(
    ("lengths", "options", "reason"),
    [
        ([257], {}, "sequences of 257 tokens, it takes at most 256"),
        ([8], {"width": 136}, "heads of 136 channels, it takes at most 128"),
        ([8], {"dtype": torch.float64}, "queries in torch.float64: its products take bfloat16 or float16"),
    ],
)
def test_what_the_triton_kernels_do_not_take(lengths, options, reason):
    parts = heads(sum(lengths), **{"dtype": torch.float16, **options})
    device = "cpu" if triton_support.INTERPRETED else "cuda"
    sequences = Sequences.from_lengths(lengths, device=device)
    message = refusal(*(part.to(device) for part in parts), sequences, backend="triton")
    assert message == f"backend 'triton' was asked for but cannot run: {reason}"


@needs_triton
def test_the_triton_kernels_have_no_second_derivative():
    """Their gradients are no function that autograd could differentiate: silence would be a wrong result."""
    device = "cpu" if triton_support.INTERPRETED else "cuda"
    parts = [part.to(device).requires_grad_() for part in heads(dtype=torch.float16)]
    out = packed_attention(*parts, Sequences.from_lengths(LENGTHS, device=device), causal=False, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), parts[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=needs_triton), pytest.param("native", marks=needs_native)]
)
def test_kernels_have_no_second_derivative_beside_another_term(backend):
    """Where the gradient that comes in is a constant, and another term has a second derivative."""
    on_gpu = backend == "triton" and not triton_support.INTERPRETED
    device, dtype = "cuda" if on_gpu else "cpu", torch.float16 if backend == "triton" else torch.float32
    parts = [part.to(device).requires_grad_() for part in heads(dtype=dtype)]
    out = packed_attention(*parts, Sequences.from_lengths(LENGTHS, device=device), causal=False, backend=backend)
    (first,) = torch.autograd.grad(out.sum() + parts[0].pow(3).sum(), parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(first.sum(), parts[0])


@pytest.mark.parametrize("name", ["flash", "varlen", "xformers"])
def test_limits_of_packages_are_told_before_they_are_called(name, monkeypatch):
    """On a machine that has them all; what each takes is in `test_attention_backends.py`."""
    known = [replace(backend, why_unavailable=lambda: None) for backend in backends._BACKENDS[OP]]
    monkeypatch.setitem(backends._BACKENDS, OP, known)
    reason = "it takes CUDA tensors only, these are on cpu"
    assert (
        refusal(*heads(dtype=torch.float16), backend=name) == f"backend '{name}' was asked for but cannot run: {reason}"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without GPU")
@pytest.mark.parametrize("name", ["flash", "varlen", "xformers"])
def test_a_backend_that_is_not_here_is_refused(name):
    message = refusal(*heads(), backend=name)
    assert message.startswith(f"backend '{name}' was asked for but cannot run: ")


def test_an_unknown_backend_is_refused():
    names = ", ".join(["auto", *(known.name for known in backends._BACKENDS[OP])])
    assert refusal(*heads(), backend="flesh") == f"unknown backend 'flesh'; choose one of {names}"
