"""Errors meant for the person at the keyboard: one line that says what, where, and how to mend it."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in input, configuration or environment. Commands print it on one line and exit with status 2."""
