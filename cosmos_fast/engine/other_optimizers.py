"""AdamW of torch and of NVIDIA's apex in the place of the fused step: for comparison, and where one is wanted by name.

Teacher, clipping and clamping are torch foreach operations around them. State and checkpoints are those of `AdamWEma`,
so that a run may change from one to the other. The host waits for the gradients' norm before the update.

apex has not yet been run on hardware here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_fast.config import OptimizerConfig
from cosmos_fast.engine.optimizer import AdamWEma
from cosmos_fast.utils import nvidia_apex


class _SteppedApart(AdamWEma):
    """The order of `AdamWEma`, with AdamW itself left to `_adamw`."""

    def _update(self, names: list[str], norm: Tensor, *, lr: float, ema_decay: float, grad_scale: float) -> None:
        norm_value = float(norm)
        if not (names and math.isfinite(norm_value)):
            return
        self._average(names, ema_decay)
        factor = grad_scale
        if self.config.clip_norm is not None:
            factor *= min(1.0, self.config.clip_norm / (abs(grad_scale) * norm_value + 1e-6))
        if factor != 1.0:
            torch._foreach_mul_([grad for name in names if (grad := self._student[name].grad) is not None], factor)
        self._adamw(names, lr)
        self._clamp_scales(names)

    def _adamw(self, names: list[str], lr: float) -> None:
        """Step the parameters of those names; `_steps` still counts the steps before this one."""
        raise AssertionError("each optimizer has its own")

    def _settings(self) -> dict[str, Any]:
        return {"betas": self.config.betas, "eps": self.config.eps}


class TorchAdamWEma(_SteppedApart):
    """torch.optim.AdamW(fused=True): one launch for many tensors on CUDA, one loop on a CPU."""

    def __init__(self, config: OptimizerConfig, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self._student.items():
            groups[self._weight_decay(name)].append(parameter)
        listed = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
        self._torch = torch.optim.AdamW(listed, fused=True, **self._settings())
        for name, parameter in self._student.items():
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {"exp_avg": self._exp_avg[name], "exp_avg_sq": self._exp_avg_sq[name]}
            self._torch.state[parameter] = {"step": step, **moments}

    def _adamw(self, names: list[str], lr: float) -> None:
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        super().load_state_dict(tensors)
        for name, parameter in self._student.items():
            self._torch.state[parameter]["step"].fill_(self._steps[name])


class ApexAdamWEma(_SteppedApart):
    """apex.optimizers.FusedAdam, which counts steps by group: parameters are grouped anew at every step."""

    def __init__(self, config: OptimizerConfig, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        parameters = list(self._student.values())
        self._apex = nvidia_apex.fused_adam(parameters[0].device)(parameters, adam_w_mode=True, **self._settings())
        self._group = {key: value for key, value in self._apex.param_groups[0].items() if key != "params"}
        for name, parameter in self._student.items():
            self._apex.state[parameter] = {"exp_avg": self._exp_avg[name], "exp_avg_sq": self._exp_avg_sq[name]}

    def _adamw(self, names: list[str], lr: float) -> None:
        groups: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)
        for name in names:
            groups[self._steps[name], self._weight_decay(name)].append(self._student[name])
        self._apex.param_groups = [
            {**self._group, "params": parameters, "step": step, "weight_decay": weight_decay, "lr": lr}
            for (step, weight_decay), parameters in groups.items()
        ]
        self._apex.step()


OTHER_OPTIMIZERS = {"torch": TorchAdamWEma, "apex": ApexAdamWEma}
