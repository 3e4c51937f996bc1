"""The soak of `serving.py`: mixed load for long while workers are killed, every answer checked.

Sentences are embedded and classified, and texts go on, where the models for that are there. Each answer is compared
with what the bundle says to that input alone. That nothing is answered twice is seen in three ways: no two answers have
one ``x-request-id``, no connection holds bytes after its last answer, and the engines count no more answers than came.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load_generator
import numpy as np
from load_generator import Load
from measure import SHARED, run_hasten
from served import hasten_server, serving

_COSINE = 0.97
"""Below it an answer is another sentence's: dynamic int8 alone moves a vector to 0.978 at most."""
_SCORE = 0.3
"""Farther off, a score is another sentence's: company moves a logit by what int8 rounds."""
_TEXTS = 500
_PROMPTS = 40
_TOKENS = 32
_OPENINGS = ("Once upon a time there was a", "One day a little", "The", "Lily and", "In the morning the big")


@dataclass(frozen=True)
class Kind:
    """Requests of one kind.

    Attributes:
        path: Where they go.
        bodies: What is sent.
        clients: How many send it.
        right: Whether an answer is that of the body of this index.
    """

    path: str
    bodies: list[Any]
    clients: int
    right: Callable[[int, Any], bool]


def soak(minilm: Path, texts: Sequence[str], folder: Path, seconds: float, kill: float) -> dict[str, Any]:
    """What became of the load.

    Args:
        minilm: Bundle of a sentence encoder.
        texts: Sentences.
        folder: Where other bundles may be made.
        seconds: Of the load.
        kill: Seconds between two workers' ends.
    """
    bundles, kinds = {"minilm": minilm}, {"embeddings": _embeddings(minilm, texts)}
    models = SHARED / "models"
    for name, kind, model, make in (
        ("sentiment", "labels", models / "minilm_sst2", _labels),
        ("stories", "texts", models / "stories260k", _stories),
    ):
        if model.exists():
            bundles[name] = folder / name
            run_hasten("compile", str(model), "-o", str(bundles[name]), "--target", "cpu", "--quiet")
            kinds[kind] = make(bundles[name], texts)
        else:
            print(f"{model} is not there: the soak has no {kind}")
    killed, sizes = 0, []
    with serving(hasten_server(bundles), "/readyz") as server:
        warm = [load_generator.run(load) for load in _loads(server.port, kinds, min(5.0, seconds), keep=False)]
        running = [load_generator.start(load) for load in _loads(server.port, kinds, seconds, keep=True)]
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0.0:
            time.sleep(min(kill, left))
            sizes.append(server.rss())
            if end - time.monotonic() > kill / 2:
                os.kill(random.Random(killed).choice(server.workers()).pid, signal.SIGKILL)
                killed += 1
        found = dict(zip(kinds, map(load_generator.result, running), strict=True))
        counted = _answers_of_engines(server.port)
    came = sum(len(one.latencies) for one in (*warm, *found.values()))
    return {
        "seconds": seconds,
        "killed": killed,
        "answered": {name: len(one.answers) for name, one in found.items()},
        "failed": [failure for one in found.values() for failure in one.failed],
        "refused": sum(len(one.refused) + one.late for one in found.values()),
        "wrong": {name: sum(not kinds[name].right(*one) for one in of.answers) for name, of in found.items()},
        "twice": sum(one.twice for one in (*warm, *found.values())) + max(0, counted - came),
        "answers that engines count": counted,
        "answers that came": came,
        "rss mb": sizes,
        "rss growth": max(sizes[1:]) / sizes[0] - 1.0 if len(sizes) > 1 else 0.0,
        "slowest s": {name: max(one.latencies, default=None) for name, one in found.items()},
    }


def _loads(port: int, kinds: dict[str, Kind], seconds: float, *, keep: bool) -> list[Load]:
    return [
        Load(port, kind.path, kind.bodies, clients=kind.clients, seconds=seconds, keep=keep) for kind in kinds.values()
    ]


def _embeddings(bundle: Path, texts: Sequence[str]) -> Kind:
    import hasten

    with hasten.load(bundle) as model:
        right = model.embed(list(texts))
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    bodies = [
        {"model": "minilm", "input": text, "encoding_format": "base64", "priority": 5 * (index % 2)}
        for index, text in enumerate(texts)
    ]
    return Kind("/v1/embeddings", bodies, 6, lambda at, got: right[at] @ load_generator.decode(got) >= _COSINE)


def _labels(bundle: Path, texts: Sequence[str]) -> Kind:
    import hasten

    with hasten.load(bundle) as model:
        right = [found.scores for found in model.classify(list(texts[:_TEXTS]))]
    bodies = [{"model": "sentiment", "texts": [text]} for text in texts[:_TEXTS]]

    def fits(at: int, got: dict[str, float]) -> bool:
        return all(abs(got[label] - score) < _SCORE for label, score in right[at].items())

    return Kind("/classify", bodies, 2, fits)


def _stories(bundle: Path, texts: Sequence[str]) -> Kind:
    import hasten

    prompts = [f"{_OPENINGS[n % len(_OPENINGS)]} {texts[n].split()[-2].lower()}" for n in range(_PROMPTS)]
    with hasten.load(bundle) as model:
        right = [one.text for one in model.generate(prompts, max_new_tokens=_TOKENS, temperature=0)]
    fields = {"model": "stories", "max_tokens": _TOKENS, "temperature": 0}
    bodies = [{**fields, "prompt": prompt} for prompt in prompts]
    return Kind("/v1/completions", bodies, 2, lambda at, got: bool(got == right[at]))


def _answers_of_engines(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        page = answer.read().decode()
    return sum(
        int(float(value)) for value in re.findall(r"^hasten_engine_requests_done_total\{.*\} (\S+)$", page, re.M)
    )
