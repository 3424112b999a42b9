"""Compiled parts of the blocks: the same results, and a number of graphs that no sequence length raises."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cosmos_fast.model import CosmosModel, compute
from cosmos_fast.model.packing import PackedLayout, SequenceGroup
from cosmos_fast.model.savings import Savings
from cosmos_fast.model.transformer import ResidualBlock, Transformer
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.transfer import move
from tests.unit.test_savings import CPU, batch, make, run, with_savings

# Towers differ in width; a part is used by the student with and without a graph, and by the teacher: 2 x 3 graphs, of
# three parts.
MOST_GRAPHS = 18


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable]]:
    """Every graph that is made; it runs as autograd's graphs of it were written, with what they make anew."""
    made: list[Callable] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # torch 2.11 makes nothing anew in dynamo's own

    torch._dynamo.reset()
    monkeypatch.setattr(compute, "COMPILER", compiler)
    monkeypatch.setattr(compute, "why_no_compiler", lambda device: None)
    yield made
    torch._dynamo.reset()


def test_lengths_and_batches_share_the_graphs(graphs: list) -> None:
    plain = make()
    student = with_savings(plain, compile=True, checkpoint_activations="mlp")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()

    def use(seed: int) -> None:
        inputs = batch(seed, size=2 + seed % 3)
        expected, plain_bytes = run(plain, inputs)
        found, kept_bytes = run(student, inputs)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
        assert kept_bytes < 0.6 * plain_bytes
        with torch.inference_mode():
            assert_near(teacher, plain, inputs)
        with torch.no_grad():
            assert_near(student.eval(), plain, inputs)
            student.train()

    for seed in range(2):
        use(seed)
    after_two = len(graphs)
    for seed in range(2, 20):
        use(seed)
    assert 0 < after_two <= MOST_GRAPHS
    assert len(graphs) == after_two


def test_more_kinds_of_use_than_torch_would_compile(graphs: list) -> None:
    """A run that evaluates and takes all negatives reaches torch's limit, past which it silently compiles no further:
    here an error."""
    config = torch._dynamo.config
    limit, failing = "recompile_limit", "fail_on_recompile_limit_hit"
    if not hasattr(config, limit):  # older versions
        limit, failing = "cache_size_limit", "fail_on_cache_limit_hit"
    part = Savings(compiler=compute.COMPILER)
    with config.patch(**{limit: 8, failing: True}):
        for kind, width in enumerate((16, 24, 32, 40, 48), start=1):
            block, x_TD = ResidualBlock(width, 2), torch.randn(7, width)
            expected = block.project(x_TD)
            for mode in (torch.enable_grad(), torch.no_grad()):
                with mode:
                    torch.testing.assert_close(part.run(ResidualBlock.project, block, x_TD), expected)
            assert len(graphs) == 2 * kind


def assert_near(model: CosmosModel, plain: CosmosModel, inputs: tuple[list[Tensor], Tensor]) -> None:
    """Same features of the global views."""
    images, texts = inputs
    found, expected = model.encode_views(images[:2], texts[:2]), plain.encode_views(images[:2], texts[:2])
    torch.testing.assert_close(found.image, expected.image, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.text, expected.text, rtol=1e-4, atol=1e-6)


CUDA = pytest.param("inductor", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize(("compiler", "device"), [("aot_eager", "cpu"), CUDA])
def test_compiled_forward_and_backward_are_the_same(compiler: str, device: str, monkeypatch) -> None:
    """On a CPU without inductor: its first kernel takes half a minute of compiling."""
    torch._dynamo.reset()
    monkeypatch.setattr(compute, "COMPILER", compiler)
    plain = make().transformer.to(device)
    compiled = with_savings(make(), compile=True).transformer.to(device)
    for tokens in (24, 33):
        found, expected = (transformed(tower, tokens, device) for tower in (compiled, plain))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def transformed(tower: Transformer, tokens: int, device: str) -> dict[str, Tensor]:
    """Outputs and gradients of a causal sequence."""
    tower.zero_grad()
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, 16, generator=generator).to(device).requires_grad_()
    group = SequenceGroup(1, tokens, (tokens - 1,), keep_all=True)
    layout = move(PackedLayout.build([group], causal=True), torch.device(device))
    out_TD = tower(x_TD, layout)
    (out_TD**2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    assert x_TD.grad is not None
    return {"out": out_TD.detach(), "x": x_TD.grad, **gradients}


def test_no_compiler_is_one_line(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no-such-compiler is not found \(CXX names another one\); set compute\.comp"):
        with_savings(make(), compile=True)
    monkeypatch.setattr(compute, "why_unusable", lambda name: f"{name} is not installed")
    assert compute.why_no_compiler(torch.device("cuda")) == "triton is not installed"
    monkeypatch.setattr(compute, "why_unusable", lambda name: None)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compute.why_no_compiler(torch.device("cuda")) == "the C compiler CC=no-such-compiler is not found"
    monkeypatch.delenv("CXX")
    assert (compute.why_no_compiler(CPU) is None) == (shutil.which("g++") is not None)
