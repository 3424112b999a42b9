"""A package `apex` like NVIDIA's as far as this program uses it, which computes the same with torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from cosmos_fast.utils import capabilities

calls: list[str] = []


class FusedAdam(torch.optim.Optimizer):
    """Counts steps by group, as apex's does, and refuses gradients it cannot have."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self):
        calls.append("FusedAdam")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                update = m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p.data
                p.data.sub_(group["lr"] * update)


class FusedLayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True):
        super().__init__()
        self.normalized_shape, self.eps, self.elementwise_affine = (normalized_shape,), eps, elementwise_affine
        self.weight, self.bias = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, x):
        """Under autocast in its type, other than torch's, which is fp32 there."""
        calls.append("FusedLayerNorm")
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return nn.functional.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


@pytest.fixture
def nvidia_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package installed, and a machine whose CPU is taken for a GPU by it."""
    folder = tmp_path / "site" / "apex"
    (folder / "optimizers").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name, content in (("optimizers", FusedAdam), ("normalization", FusedLayerNorm)):
        module = ModuleType(f"apex.{name}")
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, f"apex.{name}", module)
    monkeypatch.setattr("cosmos_fast.utils.nvidia_apex.DEVICES", ("cuda", "cpu"))
    capabilities.why_unusable.cache_clear()
    calls.clear()
    yield calls
    capabilities.why_unusable.cache_clear()
    sys.modules.pop("apex", None)
