"""What is asked of web servers: by which addresses, through which proxies, and what their refusals become."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from cosmos_fast.data import storage
from cosmos_fast.utils.errors import UserError
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
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("it is tried again"))
    with pytest.raises(UserError, match="no valid address") as error:
        opened(f"http://user:s3cret@{host}/00000.tar?key=s3cret")
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value)
