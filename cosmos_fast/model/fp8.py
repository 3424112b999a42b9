"""The linear layers of the blocks in 8-bit floating point, through torchao or NVIDIA's TransformerEngine.

Every product scales its operands by their largest magnitude as it finds it ("dynamic" or "current" scaling), weights
and activations as e4m3, gradients as e5m2; sums are in fp32. Nothing is remembered between steps, so checkpoints and
exact resume are those of any other run, and weights stay fp32 under their own names. All four products of a block
are made so (queries, keys and values; output; both of the MLP), but for the first one of the last block, which makes
fewer queries than keys; patches, token maps and heads stay as they are.

Neither has been run on hardware here; torchao's arithmetic has been tested with its emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model.transformer import ResidualBlock
from cosmos_fast.utils.capabilities import why_unusable
from cosmos_fast.utils.errors import UserError

PACKAGES = {"torchao": "torchao", "te": "transformer_engine"}  # in order of preference
LEAST_CAPABILITY = (8, 9)
ROWS = 16  # 8-bit products take multiples of this on every axis

Product = Callable[[Tensor], Tensor]


class Fp8Linear(nn.Linear):
    """An nn.Linear, under its own name and with its own parameters, whose product is made elsewhere."""

    def __init__(self, plain: nn.Linear, product: Product) -> None:
        super().__init__(plain.in_features, plain.out_features, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.product = (product,)  # in a tuple, and so no submodule: the parameters are listed once

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.product[0](x_TD)


def use_fp8_linear(blocks: list[ResidualBlock], backend: str, device: torch.device, *, emulate: bool = False) -> None:
    """Give the linear layers of these blocks 8-bit products, in place.

    backend: "auto", "torchao" or "te". emulate: torchao's imitation in fp32, on any device, for tests.

    Raises:
        UserError: no such package, a device without 8-bit products, or widths that they do not take.
    """
    reason = None if emulate else why_no_fp8(device)
    if reason is not None:
        raise UserError(f"compute.linear=fp8: {reason}; set compute.linear=plain")
    chosen = choose_package(backend)
    for block in blocks:
        width = block.attn.out_proj.in_features
        if width % ROWS:
            raise UserError(f"compute.linear=fp8 needs widths that are multiples of {ROWS}, one is {width}")
    try:
        make = _torchao_products(emulate) if chosen == "torchao" else _transformer_engine_products()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(
            f"compute.linear=fp8: this {PACKAGES[chosen]} cannot be used ({error}); set compute.linear=plain"
        ) from None
    for block in blocks:
        block.attn.in_proj_product = (_Padded(make(block.attn.in_proj_weight, block.attn.in_proj_bias)),)
        for parent, name in ((block.attn, "out_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            plain = getattr(parent, name)
            setattr(parent, name, Fp8Linear(plain, _Padded(make(plain.weight, plain.bias))))


def why_no_fp8(device: torch.device) -> str | None:
    """What `device` lacks, None for nothing."""
    if device.type != "cuda":
        return f"8-bit products run on GPUs of compute capability 8.9 and up, this run is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"8-bit products need compute capability 8.9 (Ada, Hopper), this GPU has {capability[0]}.{capability[1]}"
    return None


def choose_package(backend: str) -> str:
    """ "auto" takes the first that is there."""
    wanted = list(PACKAGES) if backend == "auto" else [backend]
    reasons = [why_unusable(PACKAGES[name]) for name in wanted]
    for name, reason in zip(wanted, reasons, strict=True):
        if reason is None:
            return name
    raise UserError(f"compute.linear=fp8: {' and '.join(filter(None, reasons))}; set compute.linear=plain")


class _Padded:
    """Takes any number of rows: zero rows change no gradient, and no largest magnitude."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, x_TD: Tensor) -> Tensor:
        rows = x_TD.shape[0]
        missing = -rows % ROWS
        return self._product(F.pad(x_TD, (0, 0, 0, missing)))[:rows] if missing else self._product(x_TD)


def _shared(module: nn.Module, weight: Tensor, bias: Tensor) -> Any:
    """`module`, made on the meta device, with these parameters."""
    module.weight, module.bias = weight, bias
    return module


def _torchao_products(emulate: bool) -> Callable[[Tensor, Tensor], Product]:
    float8 = import_module("torchao.float8")
    linear = import_module("torchao.float8.float8_linear")
    config = float8.Float8LinearConfig(emulate=emulate)

    def make(weight: Tensor, bias: Tensor) -> Product:
        plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        return linear.Float8Linear.from_float(_shared(plain, weight, bias), config=config)

    return make


def _transformer_engine_products() -> Callable[[Tensor, Tensor], Product]:
    engine = import_module("transformer_engine.pytorch")
    recipe = import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    if hasattr(engine, "autocast"):  # the name it has in later versions
        scope = partial(engine.autocast, enabled=True, recipe=recipe)
    else:
        scope = partial(engine.fp8_autocast, enabled=True, fp8_recipe=recipe)

    def make(weight: Tensor, bias: Tensor) -> Product:
        linear = engine.Linear(weight.shape[1], weight.shape[0], params_dtype=weight.dtype, device="meta")
        return _Scoped(scope, _shared(linear, weight, bias))

    return make


class _Scoped:
    """TransformerEngine's layers are 8-bit inside its own autocast only."""

    def __init__(self, scope: Callable[[], AbstractContextManager[Any]], linear: nn.Module) -> None:
        self._scope, self._linear = scope, linear

    def __call__(self, x_TD: Tensor) -> Tensor:
        with self._scope():
            return self._linear(x_TD)
