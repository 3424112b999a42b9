"""A web server for one folder, with the manners of good and bad servers, on a free port of this machine."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Web:
    """url: of the folder. The rest is set by tests while the server runs.

    ranged: whether Range is honoured. fail: answers that are still to fail, with `status`. cut: answers still to break
    off after half of their bytes. hold(): no answers while its block runs. delay_s: before each answer. etag: whether
    versions are told. password: what Authorization must hold. proxy_password: what
    Proxy-Authorization must hold. requests, sent_bytes, busy: what was asked and sent, and
    how many are being answered.
    Paths in `old/` lead to those without.
    """

    url: str = ""
    ranged: bool = True
    fail: int = 0
    status: int = 503
    retry_after: str = ""
    cut: int = 0
    delay_s: float = 0.0
    etag: bool = True
    password: str = ""
    proxy_password: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent_bytes: int = 0
    busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    may_answer: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Requests are taken, and wait for the end of the block."""
        self.may_answer.clear()
        try:
            yield
        finally:
            self.may_answer.set()

    def take(self, name: str) -> bool:
        """Count one of `name` down; whether there was one."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """Serve `folder` while the block runs."""
    web = Web()
    web.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two packets, and the second would wait 40 ms

        def do_GET(self) -> None:
            with web.lock:
                web.busy += 1
            answer(self, web, folder)
            with web.lock:
                web.busy -= 1

        def do_CONNECT(self) -> None:
            """As a proxy of https does that lets nobody through."""
            is_welcome = self.headers.get("Proxy-Authorization") == web.proxy_password
            say(self, 502 if is_welcome else 407)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(handler: BaseHTTPRequestHandler, web: Web, folder: Path) -> None:
    path = unquote(urlsplit(handler.path).path).lstrip("/")
    wanted = handler.headers.get("Range", "")
    with web.lock:
        web.requests.append((path, wanted))
    web.may_answer.wait()
    time.sleep(web.delay_s)
    if web.password and handler.headers.get("Authorization") != web.password:
        return say(handler, 401)
    if web.proxy_password and handler.headers.get("Proxy-Authorization") != web.proxy_password:
        return say(handler, 407)
    if web.take("fail"):
        return say(handler, web.status, {"Retry-After": web.retry_after} if web.retry_after else {})
    if path.startswith("old/"):
        return say(handler, 302, {"Location": "/" + path.removeprefix("old/").encode().decode("latin-1")})
    file = folder / path
    if not file.is_file():
        return say(handler, 404)
    data = file.read_bytes()
    headers = {"Last-Modified": formatdate(file.stat().st_mtime, usegmt=True)}
    if web.etag:
        headers = {"ETag": f'"{file.stat().st_mtime_ns}-{len(data)}"'}
    span = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
    if span and web.ranged:
        start, stop = int(span[1]), min(int(span[2]) + 1, len(data))
        if start >= len(data):
            return say(handler, 416, {**headers, "Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return say(handler, 206, headers, data[start:stop], web)
    return say(handler, 200, headers, data, web)


def say(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str] | None = None,
    data: bytes = b"",
    web: Web | None = None,
) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if web is not None and len(data) > 1 and web.take("cut"):
        data = data[: len(data) // 2]
        handler.close_connection = True
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(data)
        if web is not None:
            with web.lock:
                web.sent_bytes += len(data)
