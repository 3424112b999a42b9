"""The vision tower from CUDA graphs, with a capture that is none: when it happens, and what it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cosmos_fast.model import CosmosModel
from cosmos_fast.model.vision_graphs import use_vision_graphs
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import make_trainer, tiny_config
from tests.unit.test_savings import batch, make, run


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of what was captured; a "graph" runs the module itself, on the shapes it was captured with."""
    found: list[tuple[tuple[int, ...], ...]] = []

    def capture(module: nn.Module, samples: tuple[Tensor, ...], *, allow_unused_input: bool) -> object:
        assert allow_unused_input  # the pooler's parameters
        assert not any(sample.requires_grad for sample in samples)
        shapes = tuple(tuple(sample.shape) for sample in samples)
        found.append(shapes)

        def replay(*crops: Tensor) -> tuple[Tensor, ...]:
            assert tuple(tuple(crop.shape) for crop in crops) == shapes
            return module(*crops)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return found


def graphed() -> CosmosModel:
    model = make()
    names = list(model.state_dict())
    use_vision_graphs(model.visual, torch.device("cuda"))
    assert list(model.state_dict()) == names
    return model


def test_same_features_and_gradients_and_one_capture_for_repeated_shapes(captures: list) -> None:
    model = graphed()
    for seed in range(4):
        expected, _ = run(make(), batch(seed))
        found, _ = run(model, batch(seed))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert len(captures) == (seed > 0)
    assert captures == [((3, 3, 16, 16), (3, 3, 16, 16), (3, 3, 8, 8))]


def test_other_shapes_and_modes_have_graphs_of_their_own_up_to_a_limit(captures: list) -> None:
    model = graphed()
    images, _ = batch(0)
    for _ in range(3):
        with torch.no_grad():
            model.visual(images[:2])  # as the teacher is used
        model.visual(images, keep_patches=3)
        kept = model.visual(images[:1], keep_patches=2)
    assert len(captures) == 2
    assert kept.patches_MPW is not None
    assert kept.patches_MPW.shape == (2, 4, 32)


def test_a_cpu_has_no_graphs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"need a GPU, this run is on cpu; set compute\.cuda_graphs=false"):
        make_trainer(tiny_config(tmp_path, "compute.cuda_graphs=true"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    plain, model = make().to(device), make().to(device)
    use_vision_graphs(model.visual, device)
    for seed in range(4):
        images, texts = batch(seed)
        inputs = [image.to(device) for image in images], texts.to(device)
        expected, found = run_on(plain, inputs), run_on(model, inputs)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def run_on(model: CosmosModel, inputs: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients by name; no hooks, which a capture cannot have."""
    model.zero_grad()
    features = model(*inputs)
    weights = torch.arange(16, device=inputs[1].device)
    ((features.image**3 * weights).sum() + (features.text_crossmodal**3 * weights).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
