"""`hf://` addresses: huggingface_hub itself, against a hub that stands here."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from cosmos_fast import create_model, load_checkpoint
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import ModelConfig
from cosmos_fast.model.weights import DESCRIPTION
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.hub import local_path
from tests.exchange_models import CONFIG, OTHER

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = "hf://sankim2/cosmos/cosmos_vitb16_cc3m.pt"
# What the hub answers for a repository or file: status, and its header with the reason.
REFUSALS = {
    "/nobody/nothing/": (404, "RepoNotFound"),
    "/sankim2/gated/": (403, "GatedRepo"),
    "/sankim2/cosmos/resolve/v9/": (404, "RevisionNotFound"),
    "/sankim2/cosmos/resolve/main/absent.pt": (404, "EntryNotFound"),
    "/sankim2/broken/": (400, ""),
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    content = b""
    description = b""  # of weights, in every folder; empty: there is none
    asked: list[str] = []  # noqa: RUF012 - of the class, emptied by the fixture

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        status, reason = next((found for path, found in REFUSALS.items() if self.path.startswith(path)), (200, ""))
        is_description = self.path.endswith(f"/{DESCRIPTION}")
        if is_description and not self.description:
            status, reason = 404, "EntryNotFound"
        self.send_response(status)
        if reason:
            self.send_header("X-Error-Code", reason)
        body = (self.description if is_description else self.content) if status == 200 else b""
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with one file in every repository, a COSMOS checkpoint; an empty cache."""
    torch.manual_seed(0)
    models = {name: create_model(CONFIG).state_dict() for name in ("student", "teacher")}
    torch.save(models, tmp_path / "cosmos.pt")
    Hub.content = (tmp_path / "cosmos.pt").read_bytes()
    Hub.description = b""
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_is_downloaded_once(hub, tmp_path, monkeypatch):
    expected = load_checkpoint(tmp_path / "cosmos.pt", "student").state_dict()
    found = load_checkpoint(ADDRESS, weights="student")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    gets = [line for line in hub.asked if line.startswith("GET") and "cosmos_vitb16_cc3m.pt" in line]
    assert len(gets) == 1
    assert local_path(Path(ADDRESS)).read_bytes() == hub.content, "as a path, which has one slash less"
    assert [line for line in hub.asked if line.startswith("GET") and "cosmos_vitb16" in line] == gets
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(ADDRESS).config == CONFIG
    assert len(hub.asked) == asked, "what is in the cache needs no connection"


def test_a_revision_is_asked_for(hub):
    local_path(f"hf://sankim2/cosmos@{COMMIT}/folder/cosmos.pt")
    assert f"HEAD /sankim2/cosmos/resolve/{COMMIT}/folder/cosmos.pt" in hub.asked


@pytest.fixture
def open_clip(hub) -> dict[str, Any]:
    """The hub has weights of OpenCLIP, whose heads the shapes do not tell; what their description says of the model."""
    config = ModelConfig(**{**vars(OTHER), "crossmodal": False})
    described = config.to_openclip()
    hub.content = save(create_model(config).state_dict())
    described = {name: described[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    hub.description = json.dumps({"model_cfg": described}).encode()
    return described


@pytest.mark.parametrize("folder", ["", "folder/of/weights/"])
def test_the_description_of_weights_is_downloaded_with_them(hub, open_clip, tmp_path, monkeypatch, folder):
    address = f"hf://laion/clip/{folder}open_clip_model.safetensors"
    found = load_checkpoint(address).config
    assert found.to_openclip().items() >= open_clip.items()
    assert f"GET /laion/clip/resolve/{COMMIT}/{folder}{DESCRIPTION}" in hub.asked, "of the commit of the weights"
    assert local_path(address).is_symlink(), "what the cache names by its content is found by its name"
    asked = [line for line in hub.asked if DESCRIPTION in line]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(address).config == found
    out = tmp_path / "out.safetensors"
    assert run(command, ["export", "--checkpoint", address, "--to", "safetensors", "--out", str(out)]) == 0
    assert load_checkpoint(out).config == found
    assert [line for line in hub.asked if DESCRIPTION in line] == asked, "once"


def test_an_export_asks_for_the_description_too(hub, open_clip, tmp_path, capsys):
    hub.description = json.dumps({"model_cfg": {**open_clip, "quick_gelu": True}}).encode()
    address, out = "hf://laion/clip/open_clip_model.safetensors", tmp_path / "out.safetensors"
    assert run(command, ["export", "--checkpoint", address, "--to", "safetensors", "--out", str(out)]) == 2
    assert "quick_gelu, an activation that is not supported" in capsys.readouterr().err
    assert not out.exists()


def test_weights_without_a_description(hub, caplog):
    for _ in range(2):
        assert load_checkpoint(ADDRESS).config == CONFIG
    assert [line for line in hub.asked if DESCRIPTION in line] == [
        f"HEAD /sankim2/cosmos/resolve/{COMMIT}/{DESCRIPTION}"
    ]
    assert not caplog.records


def test_a_description_that_cannot_be_asked_for(hub, monkeypatch, caplog):
    """The weights were cached by another program."""
    local_path(ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(ADDRESS).config == CONFIG
    assert f"the hub does not answer whether {DESCRIPTION} lies beside it" in caplog.text


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://nobody/nothing/file.pt", "there is no repository nobody/nothing, or it is private"),
        ("hf://sankim2/gated/file.pt", "sankim2/gated is given out on request"),
        ("hf://sankim2/cosmos@v9/file.pt", "sankim2/cosmos has no such revision"),
        ("hf://sankim2/cosmos/absent.pt", "sankim2/cosmos holds no such file"),
        ("hf://sankim2/broken/file.pt", "it is not in the cache and the hub does not answer"),
        ("hf://cosmos.pt", "expected hf://owner/repository/file"),
        ("hf://sankim2/cosmos", "expected hf://owner/repository/file"),
        ("hf://-bad-/name../file.pt", "download failed"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(hub, address, message):
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(address)
    assert str(caught.value).startswith(address)
    assert "\n" not in str(caught.value)


def test_without_a_connection(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out.safetensors"
    assert run(command, ["export", "--checkpoint", ADDRESS, "--to", "safetensors", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {ADDRESS}: it is not in the cache and the hub does not answer")
    assert len(shown.splitlines()) == 1
    assert not out.exists()
    assert not hub.asked


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub: pip install 'cosmos-fast\[hub\]'"):
        load_checkpoint(ADDRESS)
