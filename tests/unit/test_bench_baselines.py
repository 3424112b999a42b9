"""Libraries that serve as baselines: called as they ask to be, and computing what they are compared with."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from benchmarks import bench_infonce, bench_optimizer, rehearsal
from benchmarks.bench_infonce import forward_eager, forward_pairs, make_features
from benchmarks.other_infonce import inf_cl_pair


@pytest.mark.skipif(find_spec("inf_cl") is None, reason="Inf-CL is not installed (pip install --no-deps inf-cl)")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels are interpreted here")
def test_inf_cl_looped_over_pairs_is_the_objective(monkeypatch):
    """Its Triton kernels in the interpreter, but for one instruction that has none: the rounding to TF32."""
    from inf_cl import flash

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # it asserts so
    monkeypatch.setattr(flash.tl, "inline_asm_elementwise", lambda asm, constraints, args, **_: args[0])
    sides = []
    for dtype, forward in ((torch.float32, lambda x: forward_pairs(x, inf_cl_pair)), (torch.float64, forward_eager)):
        features = make_features(5, 32, "cpu", 0, dtype)
        loss = forward(features)
        loss.backward()
        sides.append({"loss": loss.detach(), **{name: leaf.grad for name, leaf in features.student.items()}})
    bench_infonce.assert_agree(*sides, rtol=1e-4)


class FusedAdam(torch.optim.Optimizer):
    """The signature of NVIDIA apex's, and its arithmetic; arguments it does not have are refused."""

    made: ClassVar[list[dict[str, object]]] = []

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        assert bias_correction
        assert adam_w_mode  # AdamW's decay, which the baseline must have asked for
        self.made.append(settings)
        super().__init__(params, settings)
        self._adamw = torch.optim.AdamW(self.param_groups)

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        if any(value is not None for value in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam has been updated.")
        self._adamw.step()


def test_apex_is_a_baseline_where_it_is_installed(monkeypatch, tmp_path):
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    FusedAdam.made.clear()
    out = tmp_path / "optimizer.json"
    rehearsal.rehearse("bench_optimizer", ["--device", "cuda", "--out", str(out)])  # checks three steps of both sides
    baselines = [row["baseline"] for row in json.loads(out.read_text())]
    assert bench_optimizer.BASELINES["apex"][0] in baselines
    used = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.5}
    assert used in FusedAdam.made
