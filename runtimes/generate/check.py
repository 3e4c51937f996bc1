"""What the golden test does not see: a decoder on this provider, its cache updated in place, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from artifacts.errors import ProviderError
from artifacts.manifest import TensorSpec
from artifacts.signature import STEP_INPUTS

from ..golden import Golden, check_golden, relative_error
from ..session import Session
from .cache import layout_of
from .decoder import Decoder
from .feeds import fitted, step_feeds

_TOKENS = 8


def written_error(session: Session, inputs: Sequence[TensorSpec], golden: Golden) -> float:
    """Relative L2 error of logits that come out of the cache, against those of the same tokens read at once.

    Some tokens of the golden prompts, ragged: all but the last are read, the first prompt's in two pieces, and the last
    comes as a step. Reading at once is what the golden test has tested. A few milliseconds, whatever the prompts.

    Args:
        session: It has passed the golden test.
        inputs: Of the manifest.
        golden: The prompts. Infinite where none has two tokens.

    Raises:
        ProviderError: The session cannot run it.
    """
    ids, last = golden.feeds["input_ids"], golden.feeds["seqlens_k"].tolist()
    found = [
        row[: min(end + 1, _TOKENS - index % 3)].tolist()
        for index, (row, end) in enumerate(zip(ids, last, strict=True))
    ]
    rows = [row for row in found if len(row) > 1]
    if not rows:
        return math.inf
    layout, size = layout_of(inputs), golden.outputs["logits"].shape[2]
    feeds = step_feeds(rows, 0, np.array([[len(row) - 1] for row in rows], np.int64))
    for spec in inputs[len(STEP_INPUTS) :]:
        shape = (len(rows), int(spec.shape[1]), _TOKENS, int(spec.shape[3]))
        feeds[spec.name] = np.zeros(shape, np.dtype(spec.dtype))
    wanted = session.run(feeds)["logits"][:, 0]
    decoder = Decoder(session, layout, size, rows=len(rows), capacity=_TOKENS)
    decoder.prefill(0, [rows[0][:1], *(row[:-1] for row in rows[1:])])
    if len(rows[0]) > 2:
        decoder.prefill(0, [rows[0][:-1]], start=1)
    return relative_error(decoder.step([row[-1] for row in rows], [len(row) - 1 for row in rows]), wanted)


def check_decoder(session: Session, inputs: Sequence[TensorSpec], golden: Golden, tolerance: float, who: str) -> None:
    """Refuse a provider that fails the golden test, or on which the cache does not work; see `written_error`.

    Args:
        session: The graph there.
        inputs: That the manifest states of the graph.
        golden: Its caches may be of another form, as those of another variant of the model are.
        tolerance: Largest error of both tests.
        who: What to call the provider.

    Raises:
        ProviderError: It fails one, or the session cannot run it.
    """
    golden = Golden(dict(fitted(golden.feeds, inputs)), golden.outputs)
    check_golden(session, golden, tolerance, who)
    error = written_error(session, inputs, golden)
    if not error <= tolerance:
        raise ProviderError(
            f"{who} does not keep its KV cache in place: error of a step {error:.2g}, allowed {tolerance:.2g}"
        )
