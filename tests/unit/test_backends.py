"""`resolve` chooses in the open: first choice, reasons, refusals."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from cosmos_fast.ops import backends
from cosmos_fast.ops.backends import Backend, register, resolve


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(backends, "_BACKENDS", {})
    monkeypatch.setattr(backends, "_announced", set())
    register(
        Backend("toy", "gpu", lambda: "gpu", "needs a GPU", why_unavailable=lambda: "no GPU"),
        Backend(
            "toy", "wide", lambda: "wide", "wide only", why_unsupported=lambda x: "too narrow" if len(x) < 4 else None
        ),
        Backend("toy", "plain", lambda: "plain", "always"),
        Backend("toy", "slow", lambda: "slow", "the oracle", automatic=False),
    )


@pytest.mark.usefixtures("toy")
def test_auto_takes_the_first_that_runs_and_says_why():
    assert resolve("toy", "auto", torch.ones(4)).backend.name == "wide"
    backend, reason = resolve("toy", "auto", torch.ones(2))
    assert backend.name == "plain"
    assert reason == "gpu: no GPU; wide: too narrow; plain: first choice that runs here"


@pytest.mark.usefixtures("toy")
def test_explicit_request_is_met_or_refused():
    assert resolve("toy", "slow", torch.ones(2)).backend.name == "slow"
    with pytest.raises(ValueError, match="'gpu' was asked for but cannot run: no GPU"):
        resolve("toy", "gpu", torch.ones(2))
    with pytest.raises(ValueError, match="'wide' was asked for but cannot run: too narrow"):
        resolve("toy", "wide", torch.ones(2))
    with pytest.raises(ValueError, match="unknown backend 'warp'; choose one of auto, gpu, wide, plain, slow"):
        resolve("toy", "warp", torch.ones(2))


@pytest.mark.usefixtures("toy")
def test_reason_is_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            resolve("toy", "auto", torch.ones(4))
    assert [record.message for record in caplog.records] == [
        "toy runs on backend wide (gpu: no GPU; wide: first choice that runs here)"
    ]


@pytest.mark.usefixtures("toy")
def test_table_shows_every_backend_with_its_status():
    rows = {row["backend"]: row["status"] for row in backends.table()}
    assert rows == {"gpu": "no GPU", "wide": "available", "plain": "available", "slow": "available"}


def test_no_backend_for_auto_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "_BACKENDS", {})
    register(Backend("toy", "gpu", lambda: None, "", why_unavailable=lambda: "no GPU"))
    with pytest.raises(ValueError, match=r"no backend takes these tensors \(gpu: no GPU\)"):
        resolve("toy", "auto", torch.ones(1))


@pytest.mark.usefixtures("toy")
def test_a_loaded_backend_is_imported_at_first_use_and_once():
    loads = []
    namespace = SimpleNamespace(forward=lambda: "forward")
    register(Backend("toy", "lazy", load=lambda: loads.append(1) or namespace, summary="late", automatic=False))
    backend = resolve("toy", "lazy", torch.ones(1)).backend
    backends.table()
    assert loads == []
    assert backend.stages is backend.stages is namespace
    assert loads == [1]
    assert resolve("toy", "plain", torch.ones(1)).backend.stages() == "plain"


def test_a_backend_runs_or_loads_but_not_both():
    for given in ({}, {"run": print, "load": print}):
        with pytest.raises(AssertionError, match="either run or load"):
            Backend("toy", "x", **given)


@pytest.mark.usefixtures("toy")
def test_auto_never_chooses_interpreted_kernels(monkeypatch):
    monkeypatch.setattr(backends, "_BACKENDS", {})
    register(Backend("toy", "triton", lambda: "triton"), Backend("toy", "plain", lambda: "plain"))
    backend, reason = resolve("toy", "auto", torch.ones(1))
    assert backend.name == "plain"
    assert "interpreter runs on request only" in reason
    assert resolve("toy", "triton", torch.ones(1)).backend.name == "triton"
