"""What every way to remote shards offers, and in which words it fails; fsspec's and the shell's ways are here too."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

CHUNK = 1 << 20  # bytes handed on at a time
_REQUEST = 8 << 20  # bytes asked for at a time where an answer comes as a whole
_TAG_FIELDS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime", "modified")
_MISTAKES = {126: "it cannot be run", 127: "no such command"}


class StorageError(Exception):
    """A remote read that failed for good. The message is one line and holds no secrets of the URL."""


class UnreachableError(StorageError):
    """No fault of what is in the shard: tried again and again in vain, or one of the kinds below."""


class MissingError(UnreachableError):
    """There is nothing at this address, or nothing any more."""


class DeniedError(UnreachableError):
    """The storage refuses to answer, or does so by now: credentials that are wrong or have expired."""


class ChangedError(StorageError):
    """What is there is not what was indexed."""


class TransientError(Exception):
    """A failure that may pass. retry_after: seconds the server asked for, 0 where it did not."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Facts:
    """Of one remote file. size: bytes, None where only reading it all tells. tag: changes with the content, may be "".

    ranged: parts of it can be read.
    """

    size: int | None
    tag: str
    ranged: bool


class Transport(Protocol):
    """One way to remote files. Both calls raise StorageError or TransientError."""

    def probe(self, url: str) -> Facts:
        """Size and version, without reading the content."""

    def read(self, url: str, start: int, stop: int | None, facts: Facts) -> Iterator[bytes]:
        """Bytes start..stop-1 in chunks, from the file that `facts` describes. stop: None reads to the end."""


class FsspecTransport:
    """Whatever fsspec reads: s3://, gs://, hf://, ... Its packages are asked for when a URL needs them."""

    def probe(self, url: str) -> Facts:
        """See Transport."""
        fs, path = self._open(url)
        info = self._call(url, fs.info, path)
        if info.get("type") == "directory":
            raise MissingError(f"{shown(url)} is a folder, not a shard")
        tag = next((str(info[name]) for name in _TAG_FIELDS if info.get(name) is not None), "")
        return Facts(info.get("size"), tag, ranged=info.get("size") is not None)

    def read(self, url: str, start: int, stop: int | None, facts: Facts) -> Iterator[bytes]:
        """See Transport."""
        fs, path = self._open(url)
        if stop is None:
            yield self._call(url, fs.cat_file, path)
            return
        while start < stop:
            # by name: the third argument of s3fs is a version
            chunk = self._call(url, fs.cat_file, path, start=start, end=min(stop, start + _REQUEST))
            if not chunk:
                raise ChangedError(f"{shown(url)} ends at byte {start}, {stop} were expected")
            yield chunk
            start += len(chunk)

    def listing(self, pattern: str) -> list[str]:
        """URLs that match a pattern with * or ?, sorted."""
        fs, path = self._open(pattern)
        return sorted(fs.unstrip_protocol(name) for name in self._call(pattern, fs.glob, path))

    def _open(self, url: str) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs  # 50 ms that local shards need not wait for

            # fsspec keeps one file system a process and address; a forked process gets its own
            return url_to_fs(url)
        except ImportError as error:
            scheme = url.partition("://")[0]
            raise StorageError(
                f"{shown(url)}: {scheme}:// needs a package that is not installed ({_line(error)}); for s3 it is "
                "pip install 'cosmos-fast[remote]'"
            ) from error
        except Exception as error:
            raise StorageError(f"{shown(url)}: {_line(error)}") from error

    def _call(self, url: str, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except FileNotFoundError as error:
            raise MissingError(f"{shown(url)} is missing") from error
        except PermissionError as error:
            raise DeniedError(f"{shown(url)}: access denied; check the credentials") from error
        except Exception as error:  # back ends raise what their libraries raise
            if "Credential" in type(error).__name__:
                raise DeniedError(f"{shown(url)}: {_line(error)}") from error
            raise TransientError(f"{type(error).__name__}: {_line(error)}") from error


class PipeTransport:
    """`pipe:command`: the shard is what a shell command prints. Only for commands that the user has allowed."""

    def probe(self, url: str) -> Facts:
        """Nothing is known before the command has run, and running it here would be twice."""
        return Facts(None, "", ranged=False)

    def read(self, url: str, start: int, stop: int | None, facts: Facts) -> Iterator[bytes]:
        """See Transport; always from the beginning to the end."""
        command = url.removeprefix("pipe:")
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
            )
            assert process.stdout is not None
            try:
                while chunk := process.stdout.read(CHUNK):
                    yield chunk
                status = process.wait()
            finally:
                process.stdout.close()
                process.kill()  # nothing to kill unless reading was given up
                process.wait()
            if status:
                complaints.seek(0)
                last = complaints.read(1 << 16).decode("utf-8", "replace").strip().splitlines()[-1:]
                reason = f"{shown(url)} exited with {status}" + (f": {last[0][:200]}" if last else "")
                if status in _MISTAKES:
                    raise StorageError(f"{reason} ({_MISTAKES[status]})")
                raise TransientError(reason)


def shown(url: str) -> str:
    """The address as it may stand in a log: without password, query (signed URLs) and the tail of a long command."""
    if url.startswith("pipe:"):
        return url if len(url) <= 80 else url[:77] + "..."
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no IPv6 address
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("?")[0].partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    query = "..." if parts.query and parts.scheme in ("http", "https") else ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def file_name(url: str) -> str:
    """The last part of the address: what a shard is called in messages."""
    if url.startswith("pipe:"):
        words = [word.rpartition("/")[2].strip("'\"") for word in url.split()]
        return next((word for word in reversed(words) if ".tar" in word), shown(url))
    return unquote(urlsplit(url).path.rpartition("/")[2])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
