"""What a caller asks of a text, checked before it waits for anything: a worker would say the same, but only later."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, cast

import numpy as np

from artifacts.bundle import Bundle

from ..generate.adapters import check_adapter
from ..generate.grammars import Form
from ..generate.options import Options
from ..generate.prompts import check_length, is_integer, token_ids
from ..generate.rows import Constraint

_DEEP = ("schema", "tools", "template_variables")


class _LaterError(Exception):
    """All but the grammar was checked; that takes the tokenizer, which only the workers have."""


def check_writing(bundle: Bundle, prompt: object, options: Mapping[str, Any]) -> None:
    """Refuse a prompt or options that make no sense, as far as the manifest tells.

    Args:
        bundle: A language model.
        prompt: One.
        options: Of `Engine.generate`, without ``cache`` and ``cancel``.

    Raises:
        UsageError: There is no such option, it is out of its range or contradicts another; there is no such adapter;
            the prompt is empty, or its token ids are none or too many.
    """
    manifest = bundle.manifest
    if manifest.generation is None or manifest.processor is None:
        return
    vocabulary = cast("int", manifest.outputs[0].shape[2])
    chosen = Options.of({name: one if name in _DEEP else _plain(one) for name, one in options.items()})
    if chosen.adapter is not None:
        check_adapter(bundle, chosen.adapter)
    with suppress(_LaterError):
        chosen.job(manifest.generation, vocabulary, _later)
    if isinstance(prompt, Sized) and not len(prompt):
        check_length((), manifest.processor.max_length, vocabulary)
    if isinstance(prompt, Sequence | np.ndarray) and is_integer(prompt[0]):
        check_length(token_ids(cast("Sequence[object]", prompt)), manifest.processor.max_length, vocabulary)


def _later(form: Form, end: Collection[int], never: Collection[int]) -> Constraint:
    raise _LaterError


def _plain(value: object) -> object:
    """A value as it comes out of JSON: numpy's numbers are numbers."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return list(map(_plain, cast("Iterable[object]", value))) if isinstance(value, list | tuple | set) else value
