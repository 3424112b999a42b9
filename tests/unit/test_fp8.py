"""8-bit linear layers: who refuses them, and what they do to a model, in torchao's emulation and a stand-in."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model import CosmosModel, create_model, fp8
from cosmos_fast.model.fp8 import use_fp8_linear
from cosmos_fast.utils import capabilities
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import make_trainer, tiny_config
from tests.unit.test_compiled_blocks import graphs, transformed
from tests.unit.test_savings import batch, make, run, with_savings

__all__ = ["graphs"]

CUDA = torch.device("cuda")


def blocks_of(model: CosmosModel) -> list:
    return [*model.transformer.blocks, *model.visual.transformer.blocks]


@pytest.fixture(params=["autocast", "fp8_autocast"])
def transformer_engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[tuple[int, bool]]:
    """A package like NVIDIA's as far as this program uses it, later and earlier versions. Lists (rows, inside its
    autocast) of every product."""
    products: list[tuple[int, bool]] = []
    inside = [False]

    class Linear(nn.Module):
        def __init__(self, in_features: int, out_features: int, params_dtype: torch.dtype, device: str) -> None:
            super().__init__()
            assert (params_dtype, device) == (torch.float32, "meta")
            self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
            self.bias = nn.Parameter(torch.empty(out_features, device=device))
            self.register_buffer("extra", torch.zeros(1))  # must not show in the model's state

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[0] % 8 == 0
            assert x.shape[1] % 16 == 0
            products.append((x.shape[0], inside[0]))
            return F.linear(x, self.weight, self.bias)

    @contextmanager
    def autocast(enabled: bool, **recipe: object):
        assert enabled
        assert recipe == {"recipe" if request.param == "autocast" else "fp8_recipe": "current scaling"}
        inside[0] = True
        yield
        inside[0] = False

    for name, content in (
        ("transformer_engine", {}),
        ("transformer_engine.pytorch", {"Linear": Linear, request.param: autocast}),
        ("transformer_engine.common", {}),
        ("transformer_engine.common.recipe", {"Float8CurrentScaling": lambda: "current scaling"}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fp8, "why_unusable", lambda name: None if name == "transformer_engine" else f"no {name}")
    monkeypatch.setattr(fp8, "why_no_fp8", lambda device: None)
    return products


def test_refused_on_a_cpu_on_an_old_gpu_and_without_a_package(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"capability 8\.9 and up, this run is on cpu; set compute\.linear=plain"):
        make_trainer(tiny_config(tmp_path, "compute.linear=fp8"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"need compute capability 8\.9 \(Ada, Hopper\), this GPU has 8\.0"):
        use_fp8_linear(blocks_of(make()), "auto", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8, "why_unusable", lambda name: f"{name} is not installed")
    with pytest.raises(UserError, match=r"torchao is not installed and transformer_engine is not installed; set"):
        use_fp8_linear(blocks_of(make()), "auto", CUDA)
    with pytest.raises(UserError, match=r"fp8: transformer_engine is not installed; set compute\.linear=plain"):
        use_fp8_linear(blocks_of(make()), "te", CUDA)


def test_doctor_knows_both_packages() -> None:
    assert {"torchao", "transformer_engine"} <= {package.name for package in capabilities.PACKAGES}


def test_transformer_engine_gets_padded_rows_and_the_model_keeps_its_parameters(transformer_engine: list) -> None:
    plain = make()
    model = copy.deepcopy(plain)
    use_fp8_linear(blocks_of(model), "auto", CUDA)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    expected, _ = run(plain, batch(0))
    for changed in (model, copy.deepcopy(model)):  # a copy computes with its own parameters
        transformer_engine.clear()
        found, _ = run(changed, batch(0))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        # 2 towers of 3 blocks, 4 products each, but for the last blocks' first
        assert len(transformer_engine) == 2 * (3 * 4 - 1)
        assert all(inside and rows % 16 == 0 for rows, inside in transformer_engine)


def test_a_package_that_lacks_what_is_needed_is_one_line(transformer_engine: list) -> None:
    del sys.modules["transformer_engine.common.recipe"].Float8CurrentScaling
    with pytest.raises(UserError, match=r"this transformer_engine cannot be used \(.*Float8CurrentScaling"):
        use_fp8_linear(blocks_of(make()), "te", CUDA)


def test_width_that_8_bit_products_do_not_take(transformer_engine: list, tmp_path) -> None:
    config = tiny_config(tmp_path, "model.text={context_length: 8, vocab_size: 64, width: 24, heads: 2, layers: 2}")
    with pytest.raises(UserError, match="multiples of 16, one is 24"):
        use_fp8_linear(blocks_of(create_model(config.model)), "te", CUDA)


def test_emulated_torchao_is_near_and_leaves_names_alone() -> None:
    pytest.importorskip("torchao.float8")
    plain = make()
    model = copy.deepcopy(plain)
    use_fp8_linear(blocks_of(model), "torchao", torch.device("cpu"), emulate=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, _ = run(plain, batch(0))
    found, _ = run(model, batch(0))
    assert found.keys() == expected.keys()
    assert not torch.equal(found["text_projection"], expected["text_projection"])
    # The text tower starts from embeddings of 0.01, whose normalised sums differ by little more than 8 bits resolve.
    for name in filter(lambda name: name.startswith("visual.transformer"), expected):
        near = F.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert near > 0.98, (name, near)


def test_emulated_products_are_off_by_what_8_bits_round() -> None:
    """Every product of a block, forward and backward: e4m3 keeps 4 significant bits of a number, e5m2 keeps 3."""
    pytest.importorskip("torchao.float8")
    (plain, *_), (block, *_) = blocks_of(make()), blocks_of(make())
    use_fp8_linear([block], "torchao", torch.device("cpu"), emulate=True)
    products = (
        ("project", plain.attn.project, block.attn.project),
        *(
            (name, getattr(getattr(plain, part), name), getattr(getattr(block, part), name))
            for part, name in (("attn", "out_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))
        ),
    )
    for name, exact, found in products:
        width = plain.mlp.c_fc.out_features if name == "c_proj" else plain.mlp.c_fc.in_features
        generator = torch.Generator().manual_seed(1)
        expected, near = ([], [])
        for product, results in ((exact, expected), (found, near)):
            x_TD = torch.randn(48, width, generator=generator.manual_seed(1)).requires_grad_()
            out_TD = product(x_TD)
            (gradient,) = torch.autograd.grad(out_TD, x_TD, torch.randn(out_TD.shape, generator=generator))
            results += [out_TD.detach(), gradient]
        off = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(near, expected, strict=True)]
        assert 0.02 < off[0] < off[1] < 0.1, (name, off)


def test_compiled_they_give_the_same_bits_from_few_graphs(graphs: list) -> None:
    """Rows that 16 divides need no padding and have graphs of their own; nothing else makes new ones."""
    pytest.importorskip("torchao.float8")
    plain = make()
    compiled = with_savings(plain, compile=True)
    for model in (plain, compiled):
        use_fp8_linear(blocks_of(model), "torchao", torch.device("cpu"), emulate=True)
    made = []
    for tokens in (33, 32, 41, 48, 57, 64):
        expected, found = (transformed(model.transformer, tokens, "cpu") for model in (plain, compiled))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        made.append(len(graphs))
    assert 0 < made[0] < made[1] <= 2 * made[0]
    assert made[2:] == [made[1]] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("package", fp8.PACKAGES)
def test_on_a_gpu(package: str) -> None:
    reason = fp8.why_no_fp8(CUDA) or fp8.why_unusable(fp8.PACKAGES[package])
    if reason is not None:
        pytest.skip(reason)
    plain = make().to(CUDA)
    model = copy.deepcopy(plain)
    use_fp8_linear(blocks_of(model), package, CUDA)
    images, texts = batch(0)
    gradients = []
    for one in (plain, model):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            features = one([image.to(CUDA) for image in images], texts.to(CUDA))
        (features.image**3 * torch.arange(16, device=CUDA)).sum().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys()
    for name in filter(lambda name: name.startswith("visual.transformer"), expected):
        near = F.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert near > 0.97, (name, near)
