"""Packed attention on a GPU: backends against the definition in fp64, towers that wait for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.model import create_model
from cosmos_fast.ops import backends
from cosmos_fast.ops.attention import OP, Sequences, packed_attention
from tests import attention_fakes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HEADS, WIDTH = 4, 64
LENGTHS = [37] * 5 + [197, 197, 1, 9, 77, 40, 2, 16, 17, 196]
NAMES = [backend.name for backend in backends._BACKENDS[OP]]
SMALL = ModelConfig(
    embed_dim=64,
    vision=VisionConfig(image_size=64, patch_size=16, width=128, layers=2, head_width=64),
    text=TextConfig(context_length=24, vocab_size=100, width=128, heads=2, layers=2),
)


def skip_unless_it_runs(name: str, *tensors: Tensor) -> None:
    backend = next(backend for backend in backends._BACKENDS[OP] if backend.name == name)
    objection = backend.why_unavailable() or backend.why_unsupported(*tensors)
    if objection is not None:
        pytest.skip(f"{name}: {objection}")


def probe() -> list[Tensor]:
    """Queries, keys and values as the towers below have them."""
    return list(torch.empty(3, 1, 2, 64, device="cuda", dtype=torch.bfloat16))


def result_and_gradients(out_THd: Tensor, parts: list[Tensor], direction: Tensor) -> list[Tensor]:
    return [out_THd.detach(), *torch.autograd.grad(out_THd, parts, direction.to(out_THd.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", ["all", "last", "mixed"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_is_as_exact_as_sdpa(name, causal, queries, dtype):
    """Error against fp64 at most twice that of grouped SDPA in the same dtype; gradients three times."""
    torch.manual_seed(0)
    asked = {"all": LENGTHS, "last": [1] * len(LENGTHS), "mixed": [*LENGTHS[:5], *[1] * (len(LENGTHS) - 5)]}[queries]
    q_T3Hd, k_S3Hd = (
        torch.randn(sum(lengths), 3, HEADS, WIDTH, device="cuda", dtype=dtype) for lengths in (asked, LENGTHS)
    )
    parts = [part.requires_grad_() for part in (q_T3Hd[:, 0], k_S3Hd[:, 1], k_S3Hd[:, 2])]
    skip_unless_it_runs(name, *parts)
    sequences = Sequences.from_lengths(asked, LENGTHS, device="cuda")
    direction = torch.randn(parts[0].shape, device="cuda")
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    bounds = sequences.cu_queries.tolist(), sequences.cu_keys.tolist()
    truth = result_and_gradients(attention_fakes.attention(*exact, *bounds, causal), exact, direction.cpu())

    def errors(backend: str) -> list[float]:
        found = packed_attention(*parts, sequences, causal=causal, backend=backend)
        results = result_and_gradients(found, parts, direction)
        return [float((ours.cpu() - true).abs().max()) for ours, true in zip(results, truth, strict=True)]

    for factor, ours, sdpa, true in zip((2, 3, 3, 3), errors(name), errors("sdpa"), truth, strict=True):
        assert ours <= factor * sdpa + 1e-3 * float(true.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_towers_give_the_same_features_with_every_backend(name):
    torch.manual_seed(0)
    model = create_model(SMALL).cuda()
    skip_unless_it_runs(name, *probe())
    images = [torch.randn(6, 3, side, side, device="cuda") for side in (64, 64, 32)]
    texts = torch.randint(1, 98, (3, 6, 24)).scatter_(2, torch.randint(2, 24, (3, 6, 1)), 99)
    outcomes = []
    for backend in ("sdpa", name):
        model.set_attention(backend)
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            features = model(images, texts)
        (features.image_crossmodal.sum() + features.text_crossmodal.sum() + features.text[1].sum()).backward()
        outcomes.append((features, model.transformer.resblocks[0].attn.in_proj_weight.grad.clone()))
    (expected, expected_grad), (found, grad) = outcomes
    for field in ("image", "text", "image_crossmodal", "text_crossmodal"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0.05, atol=0.02)
    torch.testing.assert_close(grad, expected_grad, rtol=0.1, atol=0.05 * float(expected_grad.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_does_not_wait_for_the_gpu(name):
    model = create_model(SMALL).cuda()
    skip_unless_it_runs(name, *probe())
    model.set_attention(name)
    images = [torch.randn(6, 3, side, side, device="cuda") for side in (64, 64, 32)]
    texts = torch.randint(1, 98, (2, 3, 6, 24)).scatter_(3, torch.randint(2, 24, (2, 3, 6, 1)), 99)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(images, texts[0])  # compiles kernels, moves what is kept
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            features = model(images, texts[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(features.image.isfinite().all())
