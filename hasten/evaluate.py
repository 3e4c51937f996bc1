"""``hasten eval``: how well a language model predicts a text."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.table import Table
from rich.text import Text

from artifacts.errors import DataError, ProviderError, UsageError

from .generation import GENERATION, decode, task_of
from .show import console
from .use import machine_options

if TYPE_CHECKING:
    from runtimes.generate.results import Perplexity
    from runtimes.tasks.generate import Generator

_MOST_BYTES = 1 << 30
_LARGEST = 700.0  # e to a larger power is no float64


@click.command("eval", short_help="Measure how well a language model predicts a text.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--perplexity",
    "source",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='A text, or records with a "text" (.jsonl), each predicted on its own; - for standard input.',
)
@click.option(
    "--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens that are seen together."
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Stop after so many tokens.  [default: all there are]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@machine_options
def eval_command(
    bundle: Path,
    source: Path,
    window: int,
    max_tokens: int | None,
    as_json: bool,
    threads: int | None,
    **machine: Any,
) -> None:
    """Measure the perplexity of BUNDLE on a text, in windows of tokens that each begin anew."""
    from runtimes.load import load

    if (task := task_of(bundle)) != GENERATION:
        raise UsageError(f"{bundle} is a {task} model: it predicts no texts", "Evaluate a language model")
    texts = read_texts(source)
    with load(bundle, threads=threads or 0, **machine) as model:
        model = cast("Generator", model)
        if window > model.context:
            raise UsageError(f"a window of {window} tokens is beyond the model's {model.context}", "Pass a smaller one")
        found = perplexity(model, texts, window, max_tokens)
        name = model.bundle.manifest.name
    if not math.isfinite(found.value):
        raise ProviderError("the model computed a perplexity that is not finite", "Run `hasten verify`")
    if as_json:
        click.echo(json.dumps({"name": name, "data": str(source), "window": window, **found.to_dict()}, indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in (
        ("perplexity", f"{found.value:.4f}"),
        ("nats a token", f"{found.loss:.4f}"),
        ("tokens", str(found.tokens)),
        ("in windows of", str(window)),
    ):
        table.add_row(Text(key, style="dim"), Text(value))
    console().print(table)


def perplexity(model: Generator, texts: Sequence[str], window: int, max_tokens: int | None) -> Perplexity:
    """As `Generator.perplexity`, of the first ``max_tokens`` tokens of the texts; None: of all.

    Raises:
        UsageError: There is no token to predict.
        ProviderError: ONNX Runtime failed.
    """
    if max_tokens is None:
        return model.perplexity(texts, window=window)
    from runtimes.generate.results import Perplexity

    parts, left = [], max_tokens
    for text in texts:
        ids = model.encoder.encode(text)[:left]
        left -= len(ids)
        if len(ids) > 1:
            parts.append(model.perplexity(ids, window=window))
    if not parts:
        raise UsageError("there is no token to predict", "Give a text of at least two tokens")
    tokens = sum(part.tokens for part in parts)
    loss = sum(part.loss * part.tokens for part in parts) / tokens
    return Perplexity(math.exp(loss) if loss < _LARGEST else math.inf, loss, tokens)


def read_texts(source: Path) -> list[str]:
    """The texts of a file: one; or, of .jsonl, one a record.

    Raises:
        DataError: It cannot be read, is not UTF-8, has more than 1 GiB, holds no text, or a record has none.
    """
    name = "stdin" if str(source) == "-" else str(source)
    if source.suffix == ".jsonl":
        from runtimes.jsonl import read_records
        from runtimes.tasks.base import text_field

        with _opened(source) as stream:
            texts = [text_field(record, "text") for _, record in read_records(stream, name=name, form="jsonl")]
    else:
        with _opened(source) as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise DataError(f"{name} is larger than {_MOST_BYTES >> 30} GiB", "Give a part of it")
        texts = [decode(data, name)]
    if not any(texts):
        raise DataError(f"{name} holds no text", "Give a text to predict")
    return texts


def _opened(source: Path) -> Any:
    if str(source) == "-":
        return sys.stdin.buffer
    try:
        return source.open("rb")
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}", "Name a readable file") from error
