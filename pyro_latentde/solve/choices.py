# SPDX-License-Identifier: Apache-2.0
"""What to say about a name that is not among the choices."""

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["not_among"]


def not_among(what: str, got: Any, choices: Iterable[str]) -> str:
    """The text of an error: what was expected, what came, and the closest choice.

    Args:
        what: What is chosen, ``"method"``.
        got: What came instead.
        choices: The names that exist.

    Example:
        >>> from pyro_latentde.solve.choices import not_among
        >>> not_among("engine", "fusd", ["fused", "torch"])
        "engine: expected one of fused, torch; got 'fusd'. Did you mean 'fused'?"
    """
    choices = list(choices)
    close = difflib.get_close_matches(str(got), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{what}: expected one of {', '.join(choices)}; got {got!r}.{hint}"
