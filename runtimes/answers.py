"""The child's side of a conversation in lines of JSON: answers on the real stdout, and failures as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from artifacts.errors import HastenError

Request = Mapping[str, Any]
Reply = dict[str, Any]


def answer(operations: Mapping[str, Callable[[Request], Reply]], request: Request) -> Reply:
    """The reply of the operation that ``request["op"]`` names; an expected error becomes ``{"ok": false}``."""
    try:
        return {"ok": True, **operations[request["op"]](request)}
    except HastenError as error:
        return {"ok": False, "error": str(error)}
    except (KeyError, OSError, ValueError, MemoryError) as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def protect_stdout() -> BinaryIO:
    """The real stdout for answers alone; what native code prints to descriptor 1 goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers
