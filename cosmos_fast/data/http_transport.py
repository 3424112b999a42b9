"""Ranged reads over http and https with the standard library: connections kept alive, redirects, proxies."""

from __future__ import annotations

import base64
import http.client
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from cosmos_fast.data.transport import (
    CHUNK,
    ChangedError,
    DeniedError,
    Facts,
    MissingError,
    StorageError,
    TransientError,
    shown,
)

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 8
_TRANSIENT = (408, 409, 423, 425, 429)  # and all of 500 and above
_MAX_RETRY_AFTER_S = 60.0
_RESERVED = "%/:?#[]@!$&'()*+,;="  # with a meaning in addresses; `%` begins what is encoded already
_TUNNEL_DENIED = "Tunnel connection failed: 407"  # as http.client words it
_SMALL = 1 << 16  # what is left of an answer is read to keep its connection if it is no more than this


class HttpTransport:
    """http:// and https://. timeout_s: how long a server may stay silent."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._mine = threading.local()  # connections of this thread, and the process they belong to

    def probe(self, url: str) -> Facts:
        """See Transport. One byte is asked for: HEAD is refused by signed URLs and says nothing sure about ranges."""
        answer = self._get(url, {"Range": "bytes=0-0"})
        try:
            tag = _tag(answer)
            if answer.status == 206:
                return Facts(_total(answer, url), tag, ranged=True)
            if answer.status == 416:  # an empty file has no byte 0
                return Facts(_total(answer, url), tag, ranged=True)
            length = answer.getheader("Content-Length")
            return Facts(int(length) if length and length.isdigit() else None, tag, ranged=False)
        finally:
            self._finish(answer)

    def read(self, url: str, start: int, stop: int | None, facts: Facts) -> Iterator[bytes]:
        """See Transport."""
        whole = not facts.ranged
        assert whole or stop is not None
        answer = self._get(url, {} if whole else {"Range": f"bytes={start}-{(stop or 0) - 1}"})
        left = None if stop is None else stop - start
        try:
            self._check(answer, url, start, facts)
            while left is None or left > 0:
                try:
                    chunk = answer.read(CHUNK if left is None else min(CHUNK, left))
                except (OSError, http.client.HTTPException) as error:
                    raise TransientError(f"the connection broke ({_words(error)})") from error
                if not chunk:
                    break
                yield chunk
                left = None if left is None else left - len(chunk)
            if left:
                raise TransientError(f"the answer ended {left} bytes early")
        finally:
            self._finish(answer)

    def _check(self, answer: http.client.HTTPResponse, url: str, start: int, facts: Facts) -> None:
        """The answer holds the bytes that were asked for, of the version that was indexed."""
        tag = _tag(answer)
        if answer.status == 416 or (facts.tag and tag and tag != facts.tag):
            raise ChangedError(f"{shown(url)} changed since it was indexed")
        if facts.ranged:
            if answer.status != 206:
                raise ChangedError(f"{shown(url)}: the server read ranges before and does not any more")
            unit, _, span = (answer.getheader("Content-Range") or "").partition(" ")
            if unit != "bytes" or span.partition("-")[0] != str(start):
                raise StorageError(f"{shown(url)}: the server answers with other bytes than were asked for")
            if _total(answer, url) != facts.size:
                raise ChangedError(f"{shown(url)} changed its size since it was indexed")
        if answer.getheader("Content-Encoding", "identity") != "identity":
            raise StorageError(f"{shown(url)}: the server packs its answers, so bytes cannot be addressed")

    def _get(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """The answer to GET, with status 200, 206 or 416; redirects are followed."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "cosmos-fast", **headers}
        where, credentials = url, _credentials(_split(url, url))
        for _ in range(_MAX_REDIRECTS):
            parts = _split(where, url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise StorageError(f"{shown(url)} leads to {shown(where)}, which is not http")
            try:
                answer = self._send(parts, headers | credentials)
            except (ValueError, http.client.InvalidURL) as error:  # of a host name or a port
                raise _wrong(url) from error
            if answer.status in _REDIRECTS:
                to = quote(answer.getheader("Location") or "", _RESERVED, "latin-1")  # the bytes that were sent
                self._finish(answer)
                try:
                    target = urljoin(where, to)
                except ValueError as error:
                    raise _wrong(url) from error
                if _split(target, url).hostname != parts.hostname:
                    credentials = {}  # a password is for the host it was given for
                where = target
                continue
            if answer.status in (200, 206, 416):
                return answer
            self._finish(answer)
            raise _failure(answer, url)
        raise StorageError(f"{shown(url)}: more than {_MAX_REDIRECTS} redirects")

    def _send(self, parts: SplitResult, headers: dict[str, str]) -> http.client.HTTPResponse:
        path, query = _encoded(parts.path or "/"), _encoded(parts.query)
        target = urlunsplit(("", "", path, query, ""))
        if parts.scheme == "http" and (proxy := _proxy(parts)):
            target = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, query, ""))
            headers = headers | _credentials(proxy, "Proxy-Authorization")
        while True:
            connection, is_kept = self._connection(parts)
            try:
                connection.request("GET", target, headers=headers)
                answer = connection.getresponse()
            except http.client.InvalidURL:
                raise
            except (OSError, http.client.HTTPException) as error:
                self._drop(parts)
                if is_kept and not isinstance(error, TimeoutError):
                    continue  # the server has closed a connection that stood idle; a fresh one tells
                if _TUNNEL_DENIED in str(error):
                    raise DeniedError(f"{parts.hostname}: {_words(error)}; check the proxy's credentials") from error
                raise TransientError(f"{parts.hostname}: {_words(error)}") from error
            answer.cosmos_parts = parts  # type: ignore[attr-defined]
            return answer

    def _connection(self, parts: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection to the host, and whether it has been used before."""
        if getattr(self._mine, "pid", None) != os.getpid():  # a forked parent's connections stay the parent's
            self._mine.pid, self._mine.kept = os.getpid(), {}
        key = _key(parts)
        if key in self._mine.kept:
            return self._mine.kept[key], True
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        proxy = _proxy(parts)
        if proxy is None or not proxy.hostname:
            made = kind(parts.hostname, parts.port, timeout=self._timeout_s)
        elif parts.scheme == "http":
            made = http.client.HTTPConnection(proxy.hostname, proxy.port or 80, timeout=self._timeout_s)
        else:
            made = kind(proxy.hostname, proxy.port or 80, timeout=self._timeout_s)
            made.set_tunnel(parts.hostname, parts.port or 443, _credentials(proxy, "Proxy-Authorization"))
        self._mine.kept[key] = made
        return made, False

    def _finish(self, answer: http.client.HTTPResponse) -> None:
        """Keep the connection for the next request where little is left of this answer, else close it."""
        try:
            if answer.isclosed() or (
                answer.length is not None and answer.length <= _SMALL and answer.read() is not None
            ):
                return
        except (OSError, http.client.HTTPException):
            pass
        answer.close()
        self._drop(answer.cosmos_parts)  # type: ignore[attr-defined]

    def _drop(self, parts: SplitResult) -> None:
        connection = self._mine.kept.pop(_key(parts), None)
        if connection is not None:
            connection.close()


def _split(address: str, url: str) -> SplitResult:
    """The parts of an address that `url` leads to."""
    try:
        return urlsplit(address)
    except ValueError as error:
        raise _wrong(url) from error


def _wrong(url: str) -> StorageError:
    return StorageError(f"{shown(url)} is, or leads to, no valid address; check its host and its port")


def _encoded(part: str) -> str:
    """A path or a query as it may be sent: what is percent-encoded already stays as it is."""
    return quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", part), safe=_RESERVED)


def _key(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy of the environment (http_proxy, https_proxy, no_proxy) for this address."""
    address = urllib.request.getproxies().get(parts.scheme)
    if not address or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


def _credentials(parts: SplitResult, header: str = "Authorization") -> dict[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: "Basic " + base64.b64encode(pair.encode()).decode()}


def _tag(answer: http.client.HTTPResponse) -> str:
    return (answer.getheader("ETag") or answer.getheader("Last-Modified") or "").removeprefix("W/")


def _total(answer: http.client.HTTPResponse, url: str) -> int:
    """Bytes of the whole file, from an answer to a ranged request."""
    total = (answer.getheader("Content-Range") or "").rpartition("/")[2]
    if not total.isdigit():
        raise StorageError(f"{shown(url)}: the server does not tell the size of the file")
    return int(total)


def _failure(answer: http.client.HTTPResponse, url: str) -> Exception:
    status = f"{answer.status} {answer.reason}".strip()
    if answer.status in (404, 410):
        return MissingError(f"{shown(url)} is missing ({status})")
    if answer.status in _TRANSIENT or answer.status >= 500:
        after = answer.getheader("Retry-After") or ""
        if not re.fullmatch(r"[0-9]{1,9}", after):  # none, or a date
            return TransientError(f"the server answers {status}")
        message = f"the server answers {status} and asks to wait {int(after)} s"
        return TransientError(message, min(float(after), _MAX_RETRY_AFTER_S))
    if answer.status in (401, 403, 407):
        return DeniedError(f"{shown(url)}: access denied ({status}); check the address and its credentials")
    return DeniedError(f"{shown(url)}: the server answers {status}")


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
