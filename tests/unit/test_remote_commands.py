"""`data index`, `verify`, `inspect` and `coverage` of shards behind http: what they say of files, and of a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import EvaluateConfig, RemoteConfig, SourceConfig, TrainConfig
from cosmos_fast.data import inspect, verify
from cosmos_fast.data.index import open_source
from cosmos_fast.evaluate.validators import build_validators
from cosmos_fast.utils.errors import UserError
from tests.shards import sample, write_shards, write_tar
from tests.tiny_run import tiny_config
from tests.web import Web, serve

SHARDS = "{00000..00001}.tar"
SOON = ("--set", "data.remote.retry_s=0.01")
WRONG_IN_A_THIRD = ("--set", "data.max_bad_share=0.34")
DOWN = 1_000_000  # answers


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands are called in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def www(tmp_path: Path) -> Path:
    """Shards of 5 and 4 samples; 000002 is no picture, 000006 has no caption."""
    folder = write_shards(tmp_path / "www", (5, 4))
    members = {name: data for number in range(5) for name, data in sample(number).items()}
    write_tar(folder / "00000.tar", {**members, "000002.jpg": b"no picture"})
    members = {name: data for number in range(5, 9) for name, data in sample(number).items()}
    write_tar(folder / "00001.tar", {**members, "000006.json": b"{}"})
    return folder


@pytest.fixture
def web(www: Path) -> Iterator[Web]:
    with serve(www) as web:
        yield web


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `cosmos-fast data ...` and returns what it prints; one that ends with `status` 2 prints one line."""

    def call(*arguments: str, status: int = 0) -> str:
        found = run(command, ["data", *arguments])
        out, error = capsys.readouterr()
        assert found == status, error
        assert error.count("\n") == (status == 2), error
        return out + error

    return call


def only_probed(web: Web) -> bool:
    """Whether nothing was asked but what the shards are."""
    return {wanted for _, wanted in web.requests} == {"bytes=0-0"}


def test_verify_finds_what_it_finds_in_files(web: Web, www: Path, say: Any, cache_folder: Path) -> None:
    url = f"{web.url}/{SHARDS}"
    told = say("verify", url, "--workers=1", *WRONG_IN_A_THIRD)
    here = say("verify", str(www / SHARDS), "--workers=1", *WRONG_IN_A_THIRD)
    assert told.replace(url, "X").splitlines()[:-1] == here.replace(str(www / SHARDS), "X").splitlines()[:-1]
    assert "9 samples, 2 bad (22.2 %)" in told
    assert "00000.tar:000002: not an image" in told
    assert f"quarantine: {cache_folder}/index/" in told
    web.requests.clear()
    assert "9 were verified before" in say("verify", url, "--workers=1", *WRONG_IN_A_THIRD)
    assert only_probed(web)
    assert "in quarantine, left out: 2" in say("index", url)
    assert len(open_source(SourceConfig(path=url))) == 7
    assert len(open_source(SourceConfig(path=f"{web.url}/00000.tar"))) == 4, "a shard of them alone"
    write_tar(www / "00001.tar", sample(9))
    assert "6 samples, 1 bad (16.7 %); 5 were verified before" in say("verify", url, "--workers=1", *WRONG_IN_A_THIRD)


def test_a_verification_ends_where_the_server_does_and_goes_on_there(
    web: Web, say: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (f"{web.url}/{SHARDS}", "--workers=1", *WRONG_IN_A_THIRD, *SOON, "--set=data.remote.piece_mib=0.001")
    monkeypatch.setattr(verify, "PART_SAMPLES", 3)
    parts = []

    def find_bad(*given: Any) -> Any:
        parts.append(given)
        web.fail = DOWN if len(parts) == 2 else 0
        return verify_part(*given)

    verify_part = verify.find_bad
    monkeypatch.setattr(verify, "find_bad", find_bad)
    told = say("verify", *arguments, status=2)
    assert "00000.tar:000003: remote shard out of reach (" in told
    assert "503" in told
    assert "run the command again: it continues there" in told
    assert not list(cache_folder.rglob("*.quarantine"))
    web.fail = 0
    told = say("verify", *arguments)
    assert "9 samples, 2 bad (22.2 %); 3 were verified before" in told
    (file,) = cache_folder.rglob("*.quarantine")
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [(line["shard"], line["start"], line["stop"]) for line in lines] == [(0, 0, 5), (1, 0, 4)]


@pytest.mark.long
def test_worker_processes_verify_over_http_too(www: Path, web: Web, say: Any) -> None:
    many = {name: data for n in range(600) for name, data in sample(n % 7, f"{n:06d}").items()}
    write_tar(www / "00002.tar", {**many, "000333.jpg": b""})
    told = say("verify", f"{web.url}/00002.tar", "--workers=2")
    assert "600 samples, 1 bad" in told
    assert "00002.tar:000333: empty member" in told


def test_inspect_says_of_a_url_what_it_says_of_files(web: Web, www: Path, say: Any) -> None:
    url = f"{web.url}/{SHARDS}"
    options = ("--samples=3", "--set=data.order=global")
    told = say("inspect", url, *options)
    here = say("inspect", str(www / SHARDS), *options)
    assert told.replace(url, "X").splitlines()[:-1] == here.replace(str(www / SHARDS), "X").splitlines()[:-1]
    assert "9 samples in 2 shards" in told
    assert "    not an image: 1\n      00000.tar:000002 (" in told
    assert Path("inspect.png").read_bytes() == (www / "inspect.png").read_bytes()
    assert Path("inspect.html").is_file()
    web.requests.clear()
    say("inspect", url, "--samples=2", "--limit=1", "--out=look/inspect.png")
    read = [wanted for _, wanted in web.requests if wanted != "bytes=0-0"]
    assert len(read) <= 2 * (1 + 2 * 2 + 2)  # image and record: of one, and twice of each that is shown, or is broken


def test_inspect_keeps_secrets(web: Web, www: Path, say: Any) -> None:
    web.password = "Basic dXNlcjpzM2NyZXQ="
    host = web.url.removeprefix("http://")
    told = say("inspect", f"http://user:s3cret@{host}/{SHARDS}?key=s3cret", "--samples=2")
    assert f"http://{host}/" in told
    write_tar(www / "bad.tar", {"a.jpg": b"no picture", "a.json": b"{}"})
    told += say("inspect", f"http://user:s3cret@{host}/bad.tar?key=s3cret", status=2)
    assert "no usable sample" in told
    assert "s3cret" not in told + Path("inspect.html").read_text()


def test_inspect_ends_where_the_server_does(web: Web, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examine = inspect._examine

    def fail_later(found: inspect.Survey, *given: Any) -> None:
        web.fail = DOWN * (found.examined > 4)
        examine(found, *given)

    monkeypatch.setattr(inspect, "_examine", fail_later)
    told = say("inspect", f"{web.url}/{SHARDS}", *SOON, status=2)
    assert "00000.tar:000004: remote shard out of reach (" in told
    assert not Path("inspect.png").exists()


def test_coverage_reads_no_member_and_walks_in_window_order(web: Web, say: Any) -> None:
    url = f"{web.url}/{SHARDS}"
    say("index", url)
    web.requests.clear()
    options = ("--ranks=2", "--workers=3", "--batch-size=2", "--epochs=2", "--set=data.window_pieces=2", "--walk")
    told = say("coverage", url, *options, "--set=data.remote.piece_mib=0.004")
    assert only_probed(web)
    assert "9 samples in 2 shards of 4 to 5" in told
    assert "every sample exactly once" in told
    assert "9 once: as computed" in told


@pytest.mark.parametrize("name", ["index", "verify", "inspect", "coverage"])
def test_a_missing_shard_or_a_closed_door_is_one_line_before_any_work(name: str, web: Web, say: Any) -> None:
    for path in ("{00000..00002}.tar", "00002.tar"):
        assert "00002.tar is missing (404 Not Found)" in say(name, f"{web.url}/{path}", *SOON, status=2)
    assert "do not list their files" in say(name, f"{web.url}/", status=2)
    web.fail = DOWN
    assert "503" in say(name, f"{web.url}/{SHARDS}", *SOON, status=2)
    web.fail, web.password = 0, "Basic x"
    assert "access denied" in say(name, f"{web.url}/{SHARDS}", status=2)
    assert {wanted for _, wanted in web.requests} == {"bytes=0-0"}
    assert not list(Path().iterdir())


def test_index_takes_the_settings_of_a_run(web: Web, say: Any, tmp_path: Path) -> None:
    web.ranged = False  # so that shards go through the cache
    folder = tmp_path / "mine"
    settings = (f"data.train={web.url}/{SHARDS}", f"data.remote.cache_dir={folder}")
    assert "9 samples in 2 shards" in say("index", *(f"--set={setting}" for setting in settings))
    assert len(list(folder.rglob("*-whole"))) == 2
    assert "no data source" in say("index", status=2)


def evaluating(path: str, tmp_path: Path, **remote: Any) -> TrainConfig:
    config = tiny_config(tmp_path)
    data = replace(config.data, remote=RemoteConfig(**{"retry_s": 0.01, **remote}), allow_pipe=True)
    return replace(config, data=data, evaluate=EvaluateConfig(data=(SourceConfig(path=path),)))


def test_evaluation_reads_as_the_settings_of_the_run_say(web: Web, www: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    config = evaluating(f"{web.url}/{SHARDS}", tmp_path, cache_dir=str(folder))
    (remote,) = build_validators(config)
    (local,) = build_validators(evaluating(str(www), tmp_path))
    (piped,) = build_validators(evaluating(f"pipe:cat {www}/{SHARDS}", tmp_path))
    pixels = [torch.cat(validator.pixels) for validator in (remote, local, piped)]  # type: ignore[attr-defined]
    assert pixels[0].equal(pixels[1])
    assert pixels[2].equal(pixels[1])
    assert len(pixels[1]) == 7
    assert list(folder.rglob("*-*"))
    denied = evaluating(f"pipe:cat {www}/{SHARDS}", tmp_path)
    with pytest.raises(UserError, match=r"pipe.*allow_pipe"):
        build_validators(replace(denied, data=replace(denied.data, allow_pipe=False)))


def test_an_outage_gives_no_evaluation_rather_than_another_one(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluating(f"{web.url}/{SHARDS}", tmp_path, cache_gib=0)
    build_validators(config)
    decoded: list[bytes] = []

    def decode(data: bytes, *more: Any) -> Any:
        decoded.append(data)
        web.fail = DOWN * (len(decoded) > 2)
        return as_ever(data, *more)

    from cosmos_fast.evaluate import scenes

    as_ever = scenes.decode
    monkeypatch.setattr(scenes, "decode", decode)
    with pytest.raises(UserError, match=r"00000\.tar:000003: remote shard out of reach .*503.*again") as error:
        build_validators(config)
    assert "\n" not in str(error.value)
