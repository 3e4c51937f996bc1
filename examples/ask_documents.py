"""Questions to a folder of documents: python examples/ask_documents.py BUNDLE FOLDER [QUESTION ...]

BUNDLE is a compiled sentence encoder. Texts (.txt, .md, .rst) are cut into passages, whose vectors are kept in a SQLite
file: the next time only what has changed is embedded. Without a question, questions are read line by line. With
--reader, a compiled question answering model, the answer is cut out of the best passages.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import re
import sqlite3
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import hasten
from runtimes.engine.engine import Engine
from runtimes.responses import open_cache

SUFFIXES = (".txt", ".md", ".rst")
CHARACTERS = 700
"""Most of a passage; a sentence encoder reads some hundred tokens."""
PIECE = re.compile(r"\S.{0,600}?(?:[.!?](?=\s)|(?=\n\s*\n)|\Z)|\S.{0,600}(?=\s)|\S{1,600}", re.DOTALL)
"""A sentence or a paragraph, if it ends soon."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document, and the line it begins at."""

    path: str
    line: int
    text: str


class Store:
    """Passages and their vectors in a SQLite file: of one folder, by one model."""

    def __init__(self, path: Path, model: str) -> None:
        self.database = sqlite3.connect(path)
        self.database.executescript("""
            CREATE TABLE IF NOT EXISTS about (model TEXT);
            CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, hash TEXT);
            CREATE TABLE IF NOT EXISTS passages (path TEXT, line INTEGER, text TEXT, vector BLOB);
            CREATE INDEX IF NOT EXISTS by_path ON passages (path);
        """)
        if self.database.execute("SELECT model FROM about").fetchone() != (model,):
            # Vectors of another model say nothing about this one's.
            for table in ("about", "files", "passages"):
                self.database.execute(f"DELETE FROM {table}")  # noqa: S608  # names of ours
            self.database.execute("INSERT INTO about VALUES (?)", (model,))
            self.database.commit()

    def hashes(self) -> dict[str, str]:
        return dict(self.database.execute("SELECT path, hash FROM files"))

    def forget(self, path: str) -> None:
        self.database.execute("DELETE FROM passages WHERE path = ?", (path,))
        self.database.execute("DELETE FROM files WHERE path = ?", (path,))

    def keep(self, path: str, digest: str, rows: list[tuple[Passage, np.ndarray]]) -> None:
        """A document, whole or not at all: what was done before an interrupt stays done."""
        with self.database:
            self.forget(path)
            values = [(path, passage.line, passage.text, vector.tobytes()) for passage, vector in rows]
            self.database.executemany("INSERT INTO passages VALUES (?, ?, ?, ?)", values)
            self.database.execute("INSERT INTO files VALUES (?, ?)", (path, digest))

    def all(self) -> tuple[list[Passage], np.ndarray]:
        """Every passage, and the vectors float32 [n, d], of length 1."""
        rows = self.database.execute("SELECT path, line, text, vector FROM passages ORDER BY rowid").fetchall()
        vectors = np.array([np.frombuffer(row[3], np.float32) for row in rows], np.float32)
        return [Passage(*row[:3]) for row in rows], normalized(vectors)


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def passages_of(path: str, text: str) -> Iterator[Passage]:
    """Sentences, as many together as make a passage; what has no end of a sentence for long is cut between words."""
    taken: list[str] = []
    line = begin = length = counted = 0
    for piece in PIECE.finditer(text):
        words = " ".join(piece[0].split())
        if taken and length + len(words) > CHARACTERS:
            yield Passage(path, begin, " ".join(taken))
            taken, length = [], 0
        line += text.count("\n", counted, piece.start())
        counted = piece.start()
        begin = begin if taken else line + 1
        taken.append(words)
        length += len(words) + 1
    if taken:
        yield Passage(path, begin, " ".join(taken))


async def update(engine: Engine, store: Store, folder: Path) -> tuple[int, int, int]:
    """Bring the store up to date with the folder; the number of documents embedded, unchanged and gone."""
    known = store.hashes()
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    for path in set(known) - set(names):
        with store.database:
            store.forget(path)
    # Of the documents that are being embedded: name, hash, passages, vectors so far.
    under_way: deque[tuple[str, str, list[Passage], list[np.ndarray]]] = deque()

    def changed() -> Iterator[str]:
        for name in names:
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if known.get(name) != digest:
                passages = list(passages_of(name, data.decode("utf-8", "replace")))
                under_way.append((name, digest, passages, []))
                yield from (passage.text for passage in passages)

    embedded = 0

    def finish() -> int:
        done = 0
        while under_way and len(under_way[0][2]) == len(under_way[0][3]):
            name, digest, passages, vectors = under_way.popleft()
            store.keep(name, digest, list(zip(passages, vectors, strict=True)))
            done += 1
        return done

    async for vector in engine.embed_iter(changed()):
        embedded += finish()  # documents without a passage
        under_way[0][3].append(vector)
        embedded += finish()
    embedded += finish()
    return embedded, len(names) - embedded, len(set(known) - set(names))


async def questions_of(given: list[str]) -> AsyncIterator[str]:
    for question in given:
        yield question
    while not given and (line := await asyncio.to_thread(sys.stdin.readline)):
        if line.strip():
            yield line.strip()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("question", nargs="*")
    parser.add_argument("--reader", type=Path, help="bundle of a question answering model")
    parser.add_argument("--store", type=Path, default=Path("documents.sqlite"), help="[default: documents.sqlite]")
    parser.add_argument("--cache", default="documents.cache", help="folder, or redis://… [default: documents.cache]")
    parser.add_argument("--top", type=int, default=3, help="passages that are shown [default: 3]")
    asked = parser.parse_args()
    if not asked.folder.is_dir():
        parser.error(f"{asked.folder} is no folder")
    cache = open_cache(asked.cache, max_bytes=1 << 28)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(cache.close)
        engine = await stack.enter_async_context(hasten.serve_engine(asked.bundle, cache=cache))
        reader = None
        if asked.reader is not None:
            reader = await stack.enter_async_context(hasten.serve_engine(asked.reader, cache=cache))
        store = Store(asked.store, engine.bundle.digest)
        stack.enter_context(closing(store.database))
        embedded, unchanged, gone = await update(engine, store, asked.folder)
        print(f"{embedded} documents embedded, {unchanged} unchanged, {gone} gone", file=sys.stderr)
        passages, vectors = store.all()
        if not passages:
            parser.error(f"there is no text in {asked.folder}; looked for {', '.join(SUFFIXES)}")
        async for question in questions_of(asked.question):
            scores = vectors @ normalized(await engine.embed([question]))[0]
            best = [int(index) for index in np.argsort(-scores, kind="stable")[: asked.top]]
            print(question)
            if reader is not None:
                rows = [{"question": question, "context": passages[index].text} for index in best]
                answer = max(await reader.rows(rows), key=lambda row: row["score"])
                print(f"  = {answer['text']}")
            for index in best:
                passage = passages[index]
                shown = passage.text if len(passage.text) <= 160 else f"{passage.text[:157]}..."
                print(f"  {scores[index]:.2f}  {passage.path}:{passage.line}  {shown}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except hasten.HastenError as error:
        sys.exit(f"ask_documents: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
