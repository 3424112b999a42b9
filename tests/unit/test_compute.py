"""What a run may ask of the model's arithmetic, and what it gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos_fast.config import ComputeConfig
from cosmos_fast.model import compute
from cosmos_fast.model.compute import apply_compute
from cosmos_fast.ops import backends
from cosmos_fast.utils.errors import UserError
from tests.fake_apex import nvidia_apex
from tests.tiny_run import losses_of, make_trainer, tiny_config
from tests.unit.test_savings import CPU, batch, make, run

__all__ = ["nvidia_apex"]


def test_apex_layer_norm_takes_over_the_parameters(nvidia_apex: list[str]) -> None:
    plain, model = make(), make()
    apply_compute(model, ComputeConfig(layer_norm="apex"), CPU)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, _ = run(plain, batch(0))
    found, _ = run(model, batch(0))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # 3 blocks of two norms in either tower; ln_post for features and patches; ln_final for features and tokens
    assert nvidia_apex.count("FusedLayerNorm") == 2 * 3 * 2 + 4


@pytest.mark.parametrize("layer_norm", ["torch", "apex", "triton"])
@pytest.mark.usefixtures("nvidia_apex")
def test_the_residual_stream_stays_in_fp32_under_autocast(layer_norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' products are in half precision, what they are added to is not."""
    model = make()
    monkeypatch.setattr(compute, "choose", lambda op, name, probe: backends.resolve(op, "eager", probe).backend)
    apply_compute(model, ComputeConfig(layer_norm=layer_norm), CPU)  # type: ignore[arg-type]
    dtypes: list[torch.dtype] = []
    for tower in (model.transformer, model.visual.transformer):
        for block in tower.blocks[:-1]:
            block.register_forward_hook(lambda block, args, out: dtypes.extend((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*batch(0))
    assert dtypes == [torch.float32] * 8


def test_residual_norm_in_one_pass_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's stages in the place of the kernels."""
    expected, _ = run(make(), batch(0))
    model = make()
    monkeypatch.setattr(compute, "choose", lambda op, name, probe: backends.resolve(op, "eager", probe).backend)
    apply_compute(model, ComputeConfig(layer_norm="triton"), CPU)
    blocks = [*model.transformer.blocks, *model.visual.transformer.blocks]
    assert [block.residual_norm for block in blocks] == ["eager"] * 6
    found, _ = run(model, batch(0))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_residual_norm_that_cannot_run_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: str, *_: object) -> None:
        raise ValueError(f"{op}: no CUDA device")

    monkeypatch.setattr(compute, "choose", refuse)
    with pytest.raises(UserError, match=r"add_layer_norm: no CUDA device; set compute\.layer_norm=torch"):
        apply_compute(make(), ComputeConfig(layer_norm="triton"), CPU)


@pytest.mark.parametrize("setting", ["checkpoint_activations=mlp", "checkpoint_activations=blocks"])
def test_a_run_is_the_same_run(setting: str, tmp_path: Path) -> None:
    plain = make_trainer(tiny_config(tmp_path, "run.max_steps=3", "name=plain"))
    changed = make_trainer(tiny_config(tmp_path, "run.max_steps=3", "name=changed", f"compute.{setting}"))
    for trainer in (plain, changed):
        trainer.fit()
    assert losses_of(changed) == losses_of(plain)


def test_bf16_is_the_default_on_a_gpu_that_has_it(monkeypatch) -> None:
    from cosmos_fast.engine.precision import resolve_precision

    cuda = torch.device("cuda")
    for capability, name in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_precision("auto", cuda).name == name
        assert resolve_precision("fp16", cuda).name == "fp16"
    assert resolve_precision("auto", CPU).name == "fp32"
