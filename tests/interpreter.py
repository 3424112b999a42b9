"""Triton's interpreter, sooner done: what it puts in place of `triton.language` is put there once a launch.

It does so again at every call of a function inside a kernel, `tl.sum` and `tl.max` among them, with what is in place
already: a millisecond, more than most of them compute for.
"""

from __future__ import annotations

from typing import Any


class _InPlace:
    """What is returned where nothing was changed, hence nothing is to be restored."""

    def restore(self) -> None:
        pass


def patch_once_a_launch() -> None:
    """For all that this process interprets. A version of Triton with other insides stays as it is."""
    try:
        from triton.runtime import interpreter
    except Exception:  # not installed, or broken, which raises anything: the tests of kernels say so
        return
    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "GridExecutor")):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launches: list[set[frozenset[str]]] = []  # under way; of each, which names of triton.language are in place

    def patch_what_is_not(function: Any) -> Any:
        if not launches:
            return patch(function)
        found = function.__globals__.values()
        modules = frozenset(
            one.__name__ for one in (interpreter.tl, interpreter.tl.core) if any(one is x for x in found)
        )
        if modules in launches[-1]:
            return _InPlace()
        launches[-1].add(modules)
        return patch(function)

    def counted_launch(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(set())
        try:
            launch(self, *arguments, **options)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_not, counted_launch
