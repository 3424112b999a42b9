"""What is asked of web servers: by which addresses, through which proxies, and what their refusals become."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from cosmos_fast.data import faults, storage
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.utils.errors import UserError
from tests.hand_clock import HandClock
from tests.remote import check, opened
from tests.shards import write_shards
from tests.web import Web, serve


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    return folder


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    write_shards(tmp_path / "www", (5, 4))
    with serve(tmp_path / "www") as web:
        yield web


@pytest.mark.parametrize("name", ["données", "a b", "100%", "a+b&c=d;e,f", "[1]"])
def test_an_address_is_encoded_where_it_is_not_yet(web: Web, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "www" / name
    write_shards(folder, (5, 4))
    for written in (name, quote(name), f"old/{quote(name)}"):
        check(opened(f"{web.url}/{written}/{{00000..00001}}.tar?signature=é ü%2F"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:abc", "127.0.0.1:99999", "127.0.0.1:-1", "[::1", "[::x]", "a..b", "a b", "x\u2100"]
)
def test_a_host_that_is_none_is_one_line_at_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock(monkeypatch, storage)
    start_s = clock()
    with pytest.raises(UserError, match="no valid address") as error:
        opened(f"http://user:s3cret@{host}/00000.tar?key=s3cret")
    assert clock() == start_s
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "access denied"), (403, "access denied"), (404, "is missing"), (400, "answers 400")]
)
def test_a_refusal_in_the_middle_is_no_fault_of_the_samples(
    web: Web, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(web.url + "/00000.tar", cache_gib=0)
    found.read(0)
    web.fail, web.status = 10_000, status
    clock = HandClock(monkeypatch, storage)
    start_s = clock()
    with pytest.raises(SampleFault, match=words) as fault:
        found.read(1)
    assert clock() == start_s
    assert fault.value.cause == faults.UNREACHABLE_SHARD


@pytest.mark.parametrize(("password", "words"), [("s3c%72et", None), ("wr0ng", "access denied")])
def test_a_proxy_gets_its_credentials(
    web: Web, password: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", web.url.replace("http://", f"http://user:{password}@"))
    monkeypatch.setenv("no_proxy", "")
    web.proxy_password = "Basic dXNlcjpzM2NyZXQ="
    if words is None:
        check(opened("http://shards.invalid/{00000..00001}.tar"))
        return
    with pytest.raises(UserError, match=words) as error:
        opened("http://shards.invalid/00000.tar")
    assert password not in str(error.value)


@pytest.mark.parametrize(("password", "words"), [("s3cret", "502"), ("wr0ng", "407.*the proxy's credentials")])
def test_a_proxy_of_https_gets_its_credentials(
    web: Web, password: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", web.url.replace("http://", f"http://user:{password}@"))
    monkeypatch.setenv("no_proxy", "")
    web.proxy_password = "Basic dXNlcjpzM2NyZXQ="
    with pytest.raises(UserError, match=words) as error:
        opened("https://shards.invalid/00000.tar", retry_s=0.0)
    assert password not in str(error.value)


def test_a_server_that_asks_for_more_time_than_there_is_is_given_up_at_once(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HandClock(monkeypatch, storage)
    start_s = clock()
    web.fail, web.status, web.retry_after = 1, 429, "30"
    with pytest.raises(UserError, match=r"429 .* asks to wait 30 s; tried for 0 s, and no more than 9 s are waited"):
        opened(web.url + "/00000.tar", retry_s=9.0)
    assert clock() == start_s
