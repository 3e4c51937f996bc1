"""Ctrl-C and SIGTERM, so that what is under way is tidied whenever they come."""

from __future__ import annotations

import signal
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 0.05
"""An interrupt during an import is looked at again so much later."""


def install() -> None:
    """Raise `KeyboardInterrupt` on both from now on, but not for one that whoever started us has us ignore.

    While a module is imported it waits: C libraries make another error of an exception that comes out of what they
    import, or crash.
    """
    again = getattr(signal, "SIGALRM", None)
    for number in (*_NUMBERS, *([] if again is None else [again])):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def forget() -> None:
    """Have Python end with the exit code it is told, and not by SIGINT, where an interrupt has left an exec."""
    exec("")  # noqa: S102 - each exec of a text begins by forgetting


def _interrupt(number: int, frame: FrameType | None) -> None:
    if hasattr(signal, "setitimer") and _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
