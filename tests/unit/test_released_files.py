"""Files with exactly the names and shapes of the released ones, of full size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from cosmos_fast import load_checkpoint
from cosmos_fast.config.model import named_model

DATA = Path(__file__).parents[1] / "data"
NAMES = ("student", "teacher")


def released(patch: int) -> dict[str, dict[str, torch.Tensor]]:
    """A student and a teacher, whose tensors are of one storage, in two orders: no two are alike, and the file is half
    as large as a released one."""
    shapes = json.loads((DATA / f"state_dict_vit_b_{patch}.json").read_text())
    assert len(shapes) == 323
    values = torch.arange(sum(map(math.prod, shapes.values())), dtype=torch.float32).mul_(1e-8)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for weights, names in zip(NAMES, (list(shapes), list(reversed(shapes))), strict=True):
        start, found[weights] = 0, {}
        for name in names:
            count = math.prod(shapes[name])
            found[weights][name] = values[start : start + count].view(shapes[name])
            start += count
    return found


@pytest.mark.long
@pytest.mark.parametrize(("patch", "wrapped"), [(16, True), (32, False)])
def test_a_file_of_the_released_names_and_shapes_loads_as_student_and_teacher(tmp_path, patch, wrapped):
    models, file = released(patch), tmp_path / f"cosmos_vitb{patch}_cc3m.pt"
    content = {"epoch": 32, "name": "cosmos", **models}
    if wrapped:  # as a run on several GPUs saves it
        content["student"] = {f"module.{name}": tensor for name, tensor in models["student"].items()}
        content |= {"optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]}, "scaler": {"scale": 65536.0}}
    torch.save(content, file)
    del content
    for weights in NAMES:
        model = load_checkpoint(file, weights)
        assert model.config == named_model(f"ViT-B-{patch}")
        found = model.state_dict()
        assert found.keys() == models[weights].keys()
        for name, tensor in models[weights].items():
            assert torch.equal(found[name], tensor), name
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == {16: 152.4, 32: 154.0}[patch]
    file.unlink()
