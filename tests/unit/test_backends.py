"""`resolve` chooses in the open: first choice, reasons, refusals."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from cosmos_fast.ops import backends, measured
from cosmos_fast.ops.backends import Backend, register, resolve, stages_for


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
def test_choosing_is_pure_and_running_logs_each_choice_once(caplog):
    with caplog.at_level(logging.INFO):
        assert resolve("toy", "auto", torch.ones(4)) == resolve("toy", "auto", torch.ones(4))
        assert caplog.records == []
        for _ in range(3):
            assert stages_for("toy", "auto", torch.ones(4))() == "wide"
        stages_for("toy", "slow", torch.ones(4))
    assert [record.message for record in caplog.records] == [
        "toy runs on backend wide (gpu: no GPU; wide: first choice that runs here)",
        "toy runs on backend slow (asked for by name)",
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


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """CPU tensors that say they lie on a GPU of this name, and a table of measurements to write."""

    def put(order=(), ran=()):
        (tmp_path / "measured.json").write_text(json.dumps({"order": order, "ran": ran}))
        measured.load.cache_clear()

    monkeypatch.setattr(measured, "TABLE", tmp_path / "measured.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    put()
    yield put
    monkeypatch.undo()
    measured.load.cache_clear()


class OnGpu:
    """What `resolve` asks of a tensor."""

    device = torch.device("cuda", 0)

    def __init__(self, elements):
        self.elements = elements

    def __len__(self):
        return self.elements

    def numel(self):
        return self.elements


def entry(up_to, *names, device="Some GPU"):
    return {"op": "toy", "device": device, "up_to_elements": up_to, "backends": names, "commit": "abc"}


@pytest.mark.usefixtures("toy")
def test_a_measured_order_goes_before_the_order_of_registration(gpu):
    gpu([entry(None, "plain", "wide"), entry(1000, "slow", "gpu", "wide"), entry(10, "plain", device="Another GPU")])
    backend, reason = resolve("toy", "auto", OnGpu(1000))
    assert backend.name == "wide"  # gpu is faster but absent; slow is for explicit requests only
    assert reason.startswith("gpu: no GPU; wide: the fastest that runs here, as measured on Some GPU")
    assert resolve("toy", "auto", OnGpu(1001)).backend.name == "plain"
    assert resolve("toy", "auto", OnGpu(600), OnGpu(600)).backend.name == "plain"  # tensors count together
    assert resolve("toy", "auto", torch.ones(4)).backend.name == "wide"  # a CPU tensor: as registered


@pytest.mark.usefixtures("toy")
def test_a_gpu_backend_on_request_only_is_chosen_once_it_has_been_measured(gpu):
    register(Backend("toy", "cuda", lambda: "cuda", "", automatic=False))
    assert resolve("toy", "auto", OnGpu(9)).backend.name == "wide"
    gpu([entry(None, "slow", "cuda", "wide")])
    assert resolve("toy", "auto", OnGpu(9)).backend.name == "cuda"


@pytest.mark.usefixtures("toy")
def test_without_a_measurement_the_order_of_registration_holds(gpu):
    gpu([entry(10, "plain")])
    backend, reason = resolve("toy", "auto", OnGpu(11))
    assert backend.name == "wide"
    assert reason.endswith("first choice that runs here")


def test_the_table_tells_compiled_from_run(gpu, monkeypatch):
    monkeypatch.setattr(backends, "_BACKENDS", {})
    register(*(Backend("toy", name, lambda: None, "") for name in ("cuda", "triton", "plain")))
    gpu(ran=[{"op": "toy", "backend": "cuda", "device": "Some GPU", "commit": "abc"}])
    hardware = {row["backend"]: row["hardware"] for row in backends.table()}
    assert hardware == {"cuda": "tested on Some GPU", "triton": "compiled, not yet run on hardware", "plain": ""}


def test_the_committed_measurements_are_of_operations_and_backends_that_exist():
    import cosmos_fast.ops  # noqa: F401

    known = {(row["op"], row["backend"]) for row in backends.table()}
    named = {(order.op, name) for order in measured.load().order for name in order.backends}
    assert named | {(ran.op, ran.backend) for ran in measured.load().ran} <= known
