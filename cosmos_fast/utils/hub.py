"""Files of the Hugging Face hub, `hf://owner/repository/path`: downloaded once, kept in huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger

_log = get_logger(__name__)
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>[^/].*)")


def local_path(path: str | Path, beside: str | None = None) -> Path:
    """The path itself, or for `hf://owner/repository[@revision]/file` that of the downloaded copy.

    beside: name of a file that is downloaded with it, of the same folder and commit, if the repository holds it.

    Raises:
        UserError: no such file, no access, no connection, or no huggingface_hub.
    """
    text = str(path)
    if not text.startswith("hf:/"):  # as a Path, the address has lost one of its slashes
        return Path(path)
    found, shown = _ADDRESS.fullmatch(text), f"hf://{text[3:].lstrip('/')}"
    if found is None:
        raise UserError(f"{shown} is no file of the hub: expected hf://owner/repository/file")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"{shown} needs huggingface_hub: pip install 'cosmos-fast[hub]', or download the file and give its path"
        ) from None
    try:
        copy = Path(hf_hub_download(found["repository"], found["file"], revision=found["revision"]))
        if beside is not None:
            _fetch_beside(copy, found["repository"], PurePosixPath(found["file"]), beside)
        return copy
    except Exception as error:  # of the hub, of its web client, of the disk: no base class holds them all
        raise UserError(f"{shown}: {_reason(error, found['repository'])}") from error


def _fetch_beside(copy: Path, repository: str, file: PurePosixPath, name: str) -> None:
    """Download a neighbour of the file whose copy is given, or leave it where there is none."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    commit = copy.parents[len(file.parts) - 1].name  # copies lie in <cache>/<repository>/snapshots/<commit>
    neighbour = str(file.with_name(name))
    if try_to_load_from_cache(repository, neighbour, revision=commit) is not None:
        return  # it is there, or it is known that the repository holds none
    try:
        hf_hub_download(repository, neighbour, revision=commit)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        _log.warning("%s: the hub does not answer whether %s lies beside it: read without", copy, name)
    except errors.EntryNotFoundError:
        return


def _reason(error: Exception, repository: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "it is not in the cache and the hub does not answer: connect (is HF_HUB_OFFLINE set?), or give a path"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is given out on request: ask on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repository}, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repository} holds no such file"
    lines = str(error).strip().splitlines()
    return f"download failed ({lines[0] if lines else type(error).__name__})"
