"""Every error hasten raises on purpose, and the exit code each one ends the command with.

    HastenError                      1
    ├── UsageError                   2   an option or argument makes no sense
    ├── SourceError                  3   the model given cannot be read
    │   └── UnsupportedError         3   it can be read, and hasten cannot compile it (names the node or architecture)
    ├── DataError                    4   the calibration or evaluation data
    ├── OutputError                  5   OUT cannot be written, or holds something that is not ours
    ├── BundleError                  6   not a bundle, or a damaged one
    │   ├── SchemaError              6   a manifest from a newer hasten, or one that breaks a MUST of docs/format.md
    │   ├── IntegrityError           6   a file is missing, extra, a link, or has another size or hash than stated
    │   └── PackError                6   a packed bundle that may not be unpacked
    ├── FidelityError                7   the compiled model misses the quality budget (names the nearest miss)
    ├── ProviderError                8   no execution provider here runs this model correctly
    ├── PassError                    9   a pass broke one of its promises (names the reproducer folder)
    ├── InstallationError           10   this Python environment is broken or lacks an extra
    └── RequestError                11   an engine did not answer a request
        ├── OverloadError           11   the queue is full, or the deadline could not be kept: refused at once
        ├── DeadlineError           11   the time given was over
        └── WorkerError             11   the process that ran it died or hung, and so did the one that tried again

Exit code 130 is an interrupt; 70 is a bug of ours, told in one line with the path of a crash report.
"""

from __future__ import annotations

from typing import ClassVar


class HastenError(Exception):
    """Base of all errors of hasten. The text is one line: what is wrong, where, and what to do about it.

    Attributes:
        what: What is wrong, and where.
        remedy: What the user can do about it; may be empty.
        told: A document for machines was already printed, and this is in it.
    """

    exit_code: ClassVar[int] = 1
    told: bool = False

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = _one_line(what)
        self.remedy = _one_line(remedy)
        super().__init__(f"{self.what}. {self.remedy}" if self.remedy else self.what)


class UsageError(HastenError):
    """An option or argument makes no sense."""

    exit_code = 2


class SourceError(HastenError):
    """The model given cannot be read."""

    exit_code = 3


class UnsupportedError(SourceError):
    """The model can be read, and hasten cannot compile it."""


class DataError(HastenError):
    """The calibration or evaluation data is unusable."""

    exit_code = 4


class OutputError(HastenError):
    """The output cannot be written, or something that is not ours stands there."""

    exit_code = 5


class BundleError(HastenError):
    """Not a bundle, or a damaged one."""

    exit_code = 6


class SchemaError(BundleError):
    """A manifest from a newer hasten, or one that breaks a MUST of docs/format.md."""


class IntegrityError(BundleError):
    """A file of a bundle is missing, extra, a link, or has another size or hash than stated."""


class PackError(BundleError):
    """A packed bundle that may not be unpacked."""


class FidelityError(HastenError):
    """The compiled model misses the quality budget."""

    exit_code = 7


class ProviderError(HastenError):
    """No execution provider on this machine runs the model correctly."""

    exit_code = 8


class PassError(HastenError):
    """A pass broke one of its promises."""

    exit_code = 9


class InstallationError(HastenError):
    """This Python environment is broken or lacks an optional dependency."""

    exit_code = 10


class RequestError(HastenError):
    """An engine did not answer a request."""

    exit_code = 11


class OverloadError(RequestError):
    """The queue is full, or the deadline could not be kept: refused at once, nothing was computed.

    Attributes:
        retry_after: Seconds after which it may be worth another try.
    """

    def __init__(self, what: str, remedy: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(what, remedy)
        self.retry_after = retry_after


class DeadlineError(RequestError):
    """The time given was over before the answer was there."""


class WorkerError(RequestError):
    """The process that ran the request died or hung, and so did the one that tried again."""


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
