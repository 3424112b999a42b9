"""Blocks that make activations anew, and compiled ones: the same gradients, less kept, few graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cosmos_fast.config import ComputeConfig, ModelConfig, TextConfig, VisionConfig
from cosmos_fast.model import CosmosModel, create_model
from cosmos_fast.model.compute import apply_compute
from cosmos_fast.model.packing import PackedLayout, SequenceGroup
from cosmos_fast.model.savings import Savings
from cosmos_fast.model.transformer import ResidualBlock

CPU = torch.device("cpu")
MODEL = ModelConfig(
    embed_dim=16,
    pool_heads=2,
    vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=3, head_width=8),
    text=TextConfig(context_length=12, vocab_size=64, width=16, heads=2, layers=3),
)


def make() -> CosmosModel:
    torch.manual_seed(0)
    return create_model(MODEL)


def with_savings(model: CosmosModel, **compute: object) -> CosmosModel:
    changed = copy.deepcopy(model)
    apply_compute(changed, ComputeConfig(**compute), CPU)  # type: ignore[arg-type]
    return changed


def batch(seed: int, size: int = 3) -> tuple[list[Tensor], Tensor]:
    """Two crop sizes, captions of any length."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, 62, (4, size, 12), generator=generator)
    for caption in texts.flatten(0, 1):
        end = int(torch.randint(2, 12, (), generator=generator))
        caption[end], caption[end + 1 :] = 63, 0
    return [torch.randn(size, 3, side, side, generator=generator) for side in (16, 16, 8)], texts


def run(model: CosmosModel, inputs: tuple[list[Tensor], Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes that autograd kept for them, parameters apart."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(*inputs)
        total = sum(
            (getattr(features, name) ** 3 * torch.arange(16)).sum()
            for name in ("image", "text", "image_crossmodal", "text_crossmodal")
        )
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize(("recompute", "share"), [("mlp", 0.55), ("blocks", 0.15)])
def test_recomputation_gives_the_same_bits_from_less_memory(recompute: str, share: float) -> None:
    plain = make()
    changed = with_savings(plain, checkpoint_activations=recompute)
    expected, plain_bytes = run(plain, batch(0))
    found, kept_bytes = run(changed, batch(0))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept_bytes < share * plain_bytes
    assert list(changed.state_dict()) == list(plain.state_dict())


def test_nothing_is_recomputed_without_a_graph(monkeypatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the teacher has nothing to make anew")

    monkeypatch.setattr("cosmos_fast.model.savings.checkpoint", forbidden)
    changed = with_savings(make(), checkpoint_activations="blocks")
    images, texts = batch(1)
    with torch.no_grad():
        features = changed.encode_views(images, texts)
    assert torch.equal(features.image, make().encode_views(images, texts).image)


@pytest.mark.parametrize(("recompute", "products"), [("none", 24), ("mlp", 28), ("blocks", 32)])
def test_the_last_product_of_what_is_made_anew_is_left_out(recompute: str, products: int) -> None:
    """In products of [40, width] by [width, width], 12 a block forward: the MLP's second one is never repeated."""
    width, block = 32, ResidualBlock(32, 4)
    block.savings = Savings(recompute)
    layout = PackedLayout.build([SequenceGroup(2, 20, (19, 19), keep_all=True)], causal=True)
    out_TD = block(torch.randn(40, width, requires_grad=True), layout)
    with FlopCounterMode(display=False) as counter:
        out_TD.sum().backward()
    linear = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert linear / (2 * 40 * width**2) == products
