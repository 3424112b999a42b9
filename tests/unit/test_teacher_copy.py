"""What the teacher's forward pass runs on under ZeRO: the choice, and a pass block by block."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.random_batch import random_batch
from cosmos_fast.engine import teacher_copy
from cosmos_fast.engine.build import build_models
from cosmos_fast.engine.teacher_copy import TeacherInParts, choose_copy, forward_units
from cosmos_fast.engine.zero_layout import FlatLayout
from cosmos_fast.model import CosmosModel
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.memory_limits import MemoryLimits
from cosmos_fast.utils.ranks import Ranks
from tests.tiny_run import tiny_config

GIB = 2**30


def chosen(config: TrainConfig, stage: int, weights: int, memory: int, ranks: Ranks, monkeypatch) -> str:
    monkeypatch.setattr(teacher_copy, "memory_limits", lambda device: MemoryLimits(memory, memory))
    return choose_copy(config, stage, weights, ranks)


def test_auto_goes_by_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus = replace(Ranks(), device=torch.device("cuda", 0))
    assert chosen(tiny_config(tmp_path), 1, GIB, 80 * GIB, Ranks(), monkeypatch) == "parts"
    assert chosen(tiny_config(tmp_path), 0, GIB, 80 * GIB, Ranks(), monkeypatch) == "whole"  # nothing is divided
    assert chosen(tiny_config(tmp_path), 1, GIB, 80 * GIB, on_gpus, monkeypatch) == "whole"


def test_else_by_the_memory_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, alone = tiny_config(tmp_path, "run.accumulate_steps=2"), Ranks()
    assert chosen(config, 1, GIB, 80 * GIB, alone, monkeypatch) == "whole"
    assert chosen(config, 1, 5 * GIB, 80 * GIB, alone, monkeypatch) == "parts"
    assert chosen(config, 0, 5 * GIB, 80 * GIB, alone, monkeypatch) == "whole"  # nothing is divided
    shared = replace(alone, local_world_size=8)
    assert chosen(config, 1, GIB, 80 * GIB, shared, monkeypatch) == "parts"  # ranks on CPUs share the host's
    on_gpus = replace(shared, device=torch.device("cuda", 0))
    assert chosen(config, 1, GIB, 80 * GIB, on_gpus, monkeypatch) == "whole"
    graphs = tiny_config(tmp_path, "compute.cuda_graphs=true")
    assert chosen(graphs, 1, 5 * GIB, 80 * GIB, alone, monkeypatch) == "whole"
    assert chosen(tiny_config(tmp_path, recipe="demo_clip"), 1, 5 * GIB, 80 * GIB, alone, monkeypatch) == "whole"
    asked = tiny_config(tmp_path, "run.teacher_copy=parts")
    assert chosen(asked, 2, 1, 80 * GIB, alone, monkeypatch) == "parts"
    assert chosen(tiny_config(tmp_path, "run.teacher_copy=whole"), 2, 5 * GIB, GIB, alone, monkeypatch) == "whole"


def test_what_parts_leave_no_room_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ZeRO stage 0 divides nothing"):
        choose_copy(tiny_config(tmp_path, "run.teacher_copy=parts"), 0, 1, Ranks())
    for override in ("compute.cuda_graphs=true", "compute.linear=fp8"):
        with pytest.raises(UserError, match=r"set run\.teacher_copy=whole, or turn it off"):
            choose_copy(tiny_config(tmp_path, "run.teacher_copy=parts", override), 1, 1, Ranks())


def in_parts(teacher: CosmosModel) -> tuple[TeacherInParts, torch.Tensor]:
    """Of one rank; the average beside it."""
    named = dict(teacher.named_parameters())
    layout = FlatLayout.of(list(named), [p.shape for p in named.values()], None)
    count = sum(math.prod(p.shape) for p in named.values())
    average_S = layout.part(named, 0, torch.zeros(count))
    return TeacherInParts(teacher, lambda: [(average_S, layout)], Ranks()), average_S


def test_a_pass_has_the_weights_it_needs_and_leaves_none(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    whole, teacher = build_models(config, torch.device("cpu"))
    parts, average_S = in_parts(teacher)
    batch = random_batch(config, 0)
    given = batch.images[:2], batch.texts[:2]
    for scale in (1.0, 1.5):  # as after a step
        average_S.mul_(scale)
        for parameter in whole.parameters():
            parameter.data.mul_(scale)
        parts.refresh()
        with torch.inference_mode():
            found, expected = teacher.encode_views(*given), whole.encode_views(*given)
            assert torch.equal(found.image, expected.image)
            assert torch.equal(found.text, expected.text)
            assert torch.equal(teacher.encode_text(batch.texts[0]), whole.encode_text(batch.texts[0]))
            dense = [model.encode_image_dense(batch.images[0], csa=True) for model in (teacher, whole)]
            assert torch.equal(*dense)
        assert sum(parameter.numel() for parameter in teacher.parameters()) == 0
    with parts.whole(), torch.inference_mode():  # the poolers too, which a training step does not need
        assert torch.equal(
            teacher(batch.images, batch.texts).text_crossmodal, whole(batch.images, batch.texts).text_crossmodal
        )
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 0


def test_units_are_each_weight_of_the_pass_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    model, _ = build_models(config, torch.device("cpu"))
    names = [name for unit in forward_units(model) for name in unit.names]
    assert len(names) == len(set(names))
    left = {name for name, _ in model.named_parameters()} - set(names)
    assert left
    assert all("cross_pool" in name or "mapping" in name or "scale" in name for name in left)
    assert len(forward_units(model)) == config.model.vision.layers + config.model.text.layers + 2
