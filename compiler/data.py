"""Texts for calibration and fidelity: a file of the user's, or neutral text that comes with hasten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from artifacts.errors import DataError, UsageError

from .columns import Columns, label_of, text_of
from .documents import is_plain, passages, read_documents
from .tables import read_records

NEUTRAL = "built-in neutral text"
_SCORED = ("feature-extraction", "sentence-similarity")
_PAIRED = ("question-answering",)
_LABELLED = ("text-classification",)
_RUNNING = ("text-generation",)
_QUESTIONS = ("What does the text say?", "Where does it happen?", "Who or what is it about?", "How long does it take?")
_NEUTRAL_PASSAGE = 1024

Item = str | tuple[str, str]


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        text: The text; the question, for question answering.
        pair: A second text: the other sentence, or the context of the question.
        label: A similarity score, or the name or number of a class.
    """

    text: str
    pair: str | None = None
    label: str | float | None = None


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of the file.

    Attributes:
        rows: The examples; at least one.
        name: What to call it in a report: the file's name.
        labelled: Every row has a label that the task can be scored with.
    """

    rows: tuple[Row, ...]
    name: str
    labelled: bool

    def split(self, seed: int, calibration: int, held_out: int) -> tuple[Dataset, Dataset]:
        """Two disjoint random samples of at most these many rows; the same for the same seed.

        At most half of the rows are held out; a single row serves as both.
        """
        order = np.random.default_rng(seed).permutation(len(self.rows))
        if len(order) == 1:
            return self._pick(order[:calibration]), self._pick(order[:held_out])
        held = min(held_out, len(order) if not calibration else len(order) // 2)
        return self._pick(sorted(order[held : held + calibration])), self._pick(sorted(order[:held]))

    def _pick(self, indices: Iterable[int]) -> Dataset:
        return replace(self, rows=tuple(self.rows[index] for index in indices))


def read_data(path: Path | None, columns: str | None, task: str) -> Dataset:
    """The examples of a file, or neutral text where ``path`` is None.

    For text-generation an example is a passage of running text: the texts of the file may have any length. A .txt file
    then is one text, or several with ``<|endoftext|>`` between them; its lines mean nothing.

    Args:
        path: A .jsonl, .csv, .tsv or .txt file, UTF-8.
        columns: Which columns to read: ``text=5,pair=6,label=4`` by name or number from 0, or just ``text,label`` for
            their order. By default they are found by their usual names.
        task: What the rows are for.

    Raises:
        UsageError: ``columns`` makes no sense, or there is no file.
        DataError: The file is missing, empty, not UTF-8, has a line of more than 1 MB or lacks a column, or a score is
            no number.
    """
    if path is None:
        if columns is not None:
            raise UsageError(f"--columns {columns!r} speaks of a file, and there is none", "Pass it: --data FILE")
        return neutral(task)
    wanted = Columns.parse(columns) if columns is not None else None
    if task in _RUNNING:
        return _running(path, wanted)
    scored = task in _SCORED
    rows = []
    for record in read_records(path, wanted):
        text, pair = text_of(record, "text"), text_of(record, "pair")
        if not text.strip() and not pair.strip():
            continue
        label = label_of(record, number=scored and bool(pair)) if record.has("label") else None
        rows.append(Row(text, pair if record.has("pair") else None, label))
    if not rows:
        raise DataError(f"{path} is empty", "It needs at least one row with a text")
    if task in _PAIRED and any(row.pair is None for row in rows):
        raise DataError(f"{path} has no contexts, and {task} needs them", 'Name them: --columns "text=...,pair=..."')
    labels = all(row.label is not None for row in rows)
    labelled = labels and (all(row.pair is not None for row in rows) if scored else task in _LABELLED)
    return Dataset(tuple(rows), path.name, labelled)


def _running(path: Path, columns: Columns | None) -> Dataset:
    """The passages of the texts of a file."""
    plain = is_plain(path)
    if plain and columns is not None:
        raise UsageError(f"{path} has no columns", "Leave --columns out")
    records = () if plain else read_records(path, columns)
    texts = read_documents(path) if plain else (text_of(record, "text") for record in records)
    rows = tuple(Row(passage) for text in texts for passage in passages(text))
    if not rows:
        raise DataError(f"{path} is empty", "It needs at least one text")
    return Dataset(rows, path.name, labelled=False)


def neutral(task: str) -> Dataset:
    """About 120 plain English sentences of 2 to 35 words.

    For question answering they are joined to contexts with questions, for text-generation to passages.
    """
    text = files(__package__).joinpath("neutral.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if task in _PAIRED:
        contexts = [" ".join(lines[index : index + 3]) for index in range(0, len(lines) - 2)]
        rows = [Row(_QUESTIONS[index % len(_QUESTIONS)], context) for index, context in enumerate(contexts)]
    elif task in _RUNNING:
        rows = [Row(passage) for passage in passages(" ".join(lines), _NEUTRAL_PASSAGE)]
    else:
        rows = [Row(line) for line in lines]
    return Dataset(tuple(rows), NEUTRAL, labelled=False)


def with_masks(dataset: Dataset, mask_token: str, seed: int) -> Dataset:
    """For fill-mask: the mask token in place of one word of each text without one; the same word for the same seed."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in dataset.rows:
        words = row.text.split()
        index = int(generator.integers(len(words))) if words else 0
        if mask_token not in row.text:
            text = " ".join([*words[:index], mask_token, *words[index + 1 :]])
            rows.append(replace(row, text=text))
        else:
            rows.append(row)
    return replace(dataset, rows=tuple(rows))


def items(rows: Sequence[Row], task: str) -> list[Item]:
    """What to tokenize for the rows.

    For embeddings all first texts, then, where every row has one, all second texts: ``2 n`` items. Otherwise one item a
    row: the text, or (text, pair).
    """
    pairs = [row.pair for row in rows if row.pair is not None]
    if task in _SCORED:
        return [*(row.text for row in rows), *(pairs if len(pairs) == len(rows) else ())]
    return [row.text if row.pair is None else (row.text, row.pair) for row in rows]
