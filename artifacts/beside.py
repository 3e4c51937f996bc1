"""Opening a bundle while its weights are still being hashed: most of a load does not need to know yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .bundle import Bundle, check_hash, open_hashing
from .errors import BundleError
from .manifest import WEIGHTS
from .tree import reading_errors

_MOST_THREADS = 4
"""Each hashes a gigabyte a second or two; more would only wait for memory."""


@contextmanager
def opened_beside(path: Path) -> Iterator[Bundle]:
    """A bundle, opened as `open_bundle` does, but that its weights are hashed on other threads while the body runs.

    Whatever can be more than numbers (documents, graphs, the tokenizer, golden arrays) has been hashed before the body
    begins. The body may compute with the weights, and must give away nothing of it: leaving waits for the hashes, and
    where one is wrong, that is the error, also where the body failed with one of its own.

    Raises:
        SchemaError: As `open_bundle`.
        IntegrityError: As `open_bundle`; or another bundle lies there by the time that a hash was found wrong.
        BundleError: As `open_bundle`.
    """
    bundle = open_hashing(path, lambda name: WEIGHTS.fullmatch(name) is None)
    entries = [entry for entry in bundle.manifest.files if WEIGHTS.fullmatch(entry.path)]
    # The largest first, so that no thread is left alone with one.
    entries.sort(key=lambda entry: -entry.size)
    threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        found = [pool.submit(check_hash, bundle.path, entry) for entry in entries]
        try:
            yield bundle
        except Exception as error:  # what wrong weights lead to is not the cause
            if wrong := _wrong(bundle, found):
                raise wrong from error
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        if wrong := _wrong(bundle, found):
            raise wrong


def _wrong(bundle: Bundle, found: list[Future[None]]) -> BundleError | None:
    """What is wrong with the weights, when all of them are read or one is found to be."""
    try:
        with reading_errors(bundle.path):
            for one in found:
                one.result()
    except BundleError as error:
        for one in found:
            one.cancel()
        try:
            bundle.check_still_there()
        except BundleError as replaced:
            return replaced
        return error
    return None
