"""A backend is one file and one entry: the steps of docs/kernels.md, done with a toy.

The file is written into a folder as an engineer would write it; nothing else of the package is touched, and the toy is
differentiable, compiled whole, listed by doctor, refused where it must be, and timed by the sweeps.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from benchmarks import sweep
from cosmos_fast.ops import backends, multiview_infonce
from cosmos_fast.ops.backends import Backend, register

SOURCE = '''
"""Every logit at once: right, and nothing else."""
import torch


def log_sum_exps(rows, columns, scale, offset):
    logits = scale * torch.einsum("vbd,wgd->vbwg", rows.float(), columns.float())
    own = torch.arange(rows.shape[1])
    positives = logits[:, own, :, own + offset].sum()
    return logits.logsumexp(3), logits.logsumexp(1), positives


def feature_gradients(rows, columns, scale, row_lse, col_lse, offset, want_columns):
    rows, columns = rows.float(), columns.float()
    logits = scale * torch.einsum("vbd,wgd->vbwg", rows, columns)
    grad = (logits - row_lse[..., None]).exp() + (logits - col_lse[:, None]).exp()
    own = torch.arange(rows.shape[1])
    grad[:, own, :, own + offset] -= 2
    grad_columns = torch.einsum("vbwg,vbd->wgd", grad, rows) if want_columns else rows.new_empty(0)
    return torch.einsum("vbwg,wgd->vbd", grad, columns), grad_columns
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The two steps."""
    (tmp_path / "infonce_toy.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "_BACKENDS", {op: list(known) for op, known in backends._BACKENDS.items()})
    register(
        Backend(
            "multiview_infonce",
            "toy",
            load=partial(import_module, "infonce_toy"),
            summary="all logits at once",
            why_unsupported=lambda rows, columns: "it takes 64 samples at most" if columns.shape[1] > 64 else None,
        )
    )
    yield
    sys.modules.pop("infonce_toy", None)


def features(batch=5):
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(views, batch, 16, generator=generator), dim=-1) for views in (3, 2))
    return a.requires_grad_(), b.requires_grad_(), torch.tensor(10.0, requires_grad=True)


def outcome(call):
    leaves = features()
    loss = call(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.usefixtures("toy")
def test_it_computes_the_loss_with_gradients_and_under_the_compiler():
    expected = outcome(partial(multiview_infonce, backend="eager"))
    assert "infonce_toy" not in sys.modules
    plain = partial(multiview_infonce, backend="toy")
    for call in (plain, torch.compile(plain, fullgraph=True, backend="aot_eager")):
        for found, wanted in zip(outcome(call), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert "infonce_toy" in sys.modules


@pytest.mark.usefixtures("toy")
def test_it_is_listed_timed_and_refused_in_its_own_words():
    (row,) = [row for row in backends.table() if row["backend"] == "toy"]
    assert (row["op"], row["status"]) == ("multiview_infonce", "available")
    assert "toy" in sweep.backend_names("multiview_infonce")
    with pytest.raises(ValueError, match="'toy' was asked for but cannot run: it takes 64 samples at most"):
        multiview_infonce(*features(batch=65), backend="toy")
    with pytest.raises(ValueError, match=r"choose one of auto, .*toy"):
        multiview_infonce(*features(), backend="toys")
