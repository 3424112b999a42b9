"""Files of `torch.save` from anybody: nothing in them runs, and a few bytes cannot ask for much memory."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from cosmos_fast.model.pickle_check import ForeignError, PickleCheck
from cosmos_fast.utils.errors import UserError


class _LeftOut:
    """Stands for an object of numpy, whatever it was made of."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _stand_in(path: str) -> type[_LeftOut]:
    module, _, name = path.rpartition(".")
    return type(name, (_LeftOut,), {"__module__": module, "__qualname__": name})


# A learning rate by numpy's cosine is one of its numbers, and stands in the optimizer's state beside the weights. It is
# not needed, so nothing of numpy is called to make it.
_NUMPY_NUMBERS: list[Any] = [
    _stand_in(path) for path in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
]


def read_torch_file(file: Path) -> Any:
    """Tensors and plain containers, on the CPU; of an archive, tensors are read from the disk when they are used.

    Raises:
        UserError: anything else is in it, it is damaged, or it pretends to hold more than it does.
    """
    try:
        archive = zipfile.is_zipfile(file)
        if archive:
            _check_archive(file)
        _check_pickles(file, archive)
        with torch.serialization.safe_globals(_NUMPY_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols of pickle: what cannot be read raises
            # Mapped: a tensor that claims more than its record cannot read beyond what the file has.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except ForeignError as error:
        raise UserError(
            f"{file} holds objects other than tensors ({error}) and is not loaded: unpickling it could run foreign "
            "code, or take any amount of memory"
        ) from None
    except Exception as error:  # no base class holds what an unpickler makes of bytes at random
        text = str(error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        raise UserError(f"{file} is damaged or no PyTorch checkpoint ({reason})") from None


def _check_pickles(file: Path, archive: bool) -> None:
    """The pickles that torch is about to read, as it finds them."""
    check = PickleCheck(file.stat().st_size)
    if archive:
        check.walk(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))
        return
    with open(file, "rb") as opened:
        for _ in ("magic number", "version of the layout", "system", "content"):
            check.walk(opened)
        if not check.storages.keys() <= set(check.walk(opened)):
            raise ValueError("it lacks the elements of its tensors")


def _check_archive(file: Path) -> None:
    """Its members lie in the file as they are, each for itself, as `torch.save` writes them."""
    with zipfile.ZipFile(file) as opened:
        members = opened.infolist()
    if any(re.fullmatch(r"[^/]+/constants\.pkl", member.filename) for member in members):
        raise UserError(
            f"{file} is a TorchScript program, as OpenAI publishes CLIP: torch.save its state_dict(), and give that"
        )
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(f"{file}: {packed[0]} in it is compressed, which torch.save never does: it is not loaded")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise UserError(f"{file} claims to hold more bytes than it has: it is damaged")
