"""A bundle as one file: a tar of one possible form, in one zstd frame.

The form is exact: for the same bundle there is one sequence of bytes before compression, and `unpack` takes no other.
So no header is ever interpreted: what stands in the manifest says which bytes must come, and they come or the file is
refused. Only the sizes of manifest.json and proof.json are read from their headers, under a bound.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from .bundle import Bundle, check_proof, check_replaceable, open_bundle
from .digest import sha256_bytes
from .errors import IntegrityError, OutputError, PackError
from .manifest import MANIFEST_NAME, PROOF_NAME, FileEntry, Manifest
from .proof import Proof
from .strict import MAX_DOCUMENT
from .swap import Staging, output_errors, staged_file
from .tree import Writable, copy_exactly, open_plain, reading_errors
from .ustar import BLOCK, SIZE_FIELD, difference, header_of, padded

MAX_RATIO = 100
"""Most bytes unpacked for each byte packed; weights of models never shrink so far."""
FREE_BYTES = 16 << 20
"""Bytes unpacked to which that bound does not apply."""

_END = bytes(2 * BLOCK)
_LEVEL = 9
_MIN_MATCH = 7
"""Bytes that are worth a reference: shorter ones, between the zeros of a pruned weight, cost more than they save."""
_MAX_WINDOW = 1 << 27
_FEED = 2048
"""Bytes decompressed at a time: few enough that what a bomb makes of them (128 KiB for 4) does no harm."""


def pack(bundle_dir: Path, file: Path) -> Bundle:
    """Pack a bundle into one file; the same bundle gives the same bytes (with the same version of zstandard).

    Args:
        bundle_dir: Folder of the bundle.
        file: Where the packed bundle is to be; one that is there is replaced.

    Returns:
        The bundle that was packed.

    Raises:
        BundleError: It is no sound bundle.
        OutputError: The file cannot be written, or something other than a packed bundle is there.
    """
    bundle = open_bundle(bundle_dir, verify=False)
    out = Path(os.path.realpath(file))
    _check_place(out, Path(os.path.realpath(bundle_dir)))
    members = _members(bundle)
    total = sum(padded(entry.size) + BLOCK for entry in members) + len(_END)
    compressor = zstandard.ZstdCompressor(compression_params=_parameters(total))
    with staged_file(out) as target:
        # No context manager: left by an error, it would complain of a frame that is too short.
        sink = compressor.stream_writer(target, size=total, closefd=False)
        for entry in members:
            _pack_member(bundle.path, entry, sink)
        sink.write(_END)
        sink.flush(zstandard.FLUSH_FRAME)
        if _is_bomb(total, target.tell()):
            raise PackError(f"{bundle_dir} shrinks {MAX_RATIO} times and more; a packed form would be taken for a bomb")
    return bundle


@dataclass(frozen=True)
class Packing:
    """What a packed bundle saves.

    Attributes:
        size: Bytes of the bundle's files.
        packed: Bytes of the packed file.
        weights: Bytes of its weight files.
        zeros: How many of those are 0: pruned floats and int8. Blocks of 2 to 8 bits stand for 0 by another code.
    """

    size: int
    packed: int
    weights: int
    zeros: int


def measure(bundle: Bundle, file: Path) -> Packing:
    """What was saved by packing ``bundle`` into ``file``.

    Raises:
        BundleError: A file of either cannot be read.
    """
    members = _members(bundle)
    weights = [entry for entry in members if entry.path.startswith("weights/")]
    zeros = _ZeroBytes()
    with reading_errors(bundle.path):
        for entry in weights:
            with open_plain(bundle.path, entry.path) as source:
                copy_exactly(source, entry.size, zeros)
    with reading_errors(file):
        packed = file.stat().st_size
    return Packing(sum(e.size for e in members), packed, sum(e.size for e in weights), zeros.count)


def unpack(file: Path, out: Path, *, force: bool = False) -> Bundle:
    """Unpack a packed bundle: at once, or not at all.

    Args:
        file: The packed bundle.
        out: Where the bundle is to be: nothing, an empty folder, or a bundle that it replaces.
        force: Replace whatever else is there.

    Raises:
        PackError: It is not exactly what `pack` makes; or its manifest.json or proof.json breaks a MUST.
        OutputError: The bundle cannot be written.
    """
    with Staging(Path(out)) as staging:
        check_replaceable(staging.out, force=force)
        with _opened(Path(file)) as source:
            _unpack_into(source, staging)
        bundle = open_bundle(staging.path, verify=False)
        check_replaceable(staging.out, force=force)
        staging.swap()
        return Bundle(staging.out, bundle.manifest, bundle.proof, bundle.digest)


class _ZeroBytes:
    """Counts the bytes that are 0."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: bytes, /) -> int:
        self.count += data.count(0)
        return len(data)


class _Source:
    """The tar of a packed bundle, read from front to back.

    Attributes:
        file: Its path, for errors.
        packed: Bytes of the packed file.
    """

    def __init__(self, file: Path, raw: BinaryIO) -> None:
        self.file = file
        self.packed = os.fstat(raw.fileno()).st_size
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
        self._ready = bytearray()

    def error(self, problem: str) -> PackError:
        """What to raise to refuse the file."""
        return PackError(f"{self.file} is no sound packed bundle: {problem}", "get the file again")

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only at the end.

        Raises:
            PackError: It is no zstd frame, an altered one, or cannot be read.
        """
        try:
            while len(self._ready) < size and not self._frame.eof and (chunk := self._raw.read(_FEED)):
                self._ready += self._frame.decompress(chunk)
        except zstandard.ZstdError as error:
            raise self.error(f"zstd: {error}") from error
        except OSError as error:
            raise self.error(f"it cannot be read: {error.strerror or error}") from error
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def exactly(self, size: int) -> bytes:
        """``size`` bytes.

        Raises:
            PackError: The file ends before.
        """
        data = self.read(size)
        if len(data) != size:
            raise self.error("it is cut off")
        return data

    def finish(self) -> None:
        """Refuse what comes after the end.

        Raises:
            PackError: Something does, or the frame is cut off.
        """
        if self.exactly(len(_END)) != _END or self.read(1):
            raise self.error("something comes after the last file")
        if not self._frame.eof:
            raise self.error("it is cut off")
        if self._frame.unused_data or self._raw.read(1):
            raise self.error("something comes after the end")


@contextmanager
def _opened(file: Path) -> Iterator[_Source]:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise PackError(f"{file} is no file", "name a file that hasten pack wrote")
        raw = file.open("rb")
    except OSError as error:
        raise PackError(f"{file} cannot be read: {error.strerror or error}") from error
    with raw:
        yield _Source(file, raw)


def _unpack_into(source: _Source, staging: Staging) -> None:
    """Write the files of a packed bundle into a staging folder.

    Raises:
        PackError: It is not exactly what `pack` makes.
        OutputError: A file cannot be written.
    """
    data = _read_document(source, MANIFEST_NAME)
    manifest = Manifest.parse(data)
    proven = _read_document(source, PROOF_NAME)
    proof = Proof.parse(proven)
    check_proof(Bundle(source.file, manifest, proof, f"sha256:{sha256_bytes(data)}"))
    rest = sorted((*manifest.files, *proof.files), key=lambda entry: entry.path)
    total = sum(padded(entry.size) for entry in rest)
    if _is_bomb(total, source.packed):
        raise source.error(f"{source.packed} bytes claim to hold {total}: a bomb")
    root = staging.path
    with output_errors(staging.out):
        if total > shutil.disk_usage(root).free:
            raise OutputError(f"{source.file} holds {total} bytes; the disk of {root.parent} has less", "free space")
        (root / MANIFEST_NAME).write_bytes(data)
        (root / PROOF_NAME).write_bytes(proven)
        seen = {MANIFEST_NAME, PROOF_NAME}
        for entry in rest:
            _unpack_member(source, entry, root, seen)
            seen.add(entry.path)
    source.finish()


def _read_document(source: _Source, name: str) -> bytes:
    """The content of the next member, which must be ``name``.

    Raises:
        PackError: It is not, or has more bytes than such a document may have.
    """
    header = source.exactly(BLOCK)
    field = header[SIZE_FIELD]
    size = int(field[:11], 8) if re.fullmatch(rb"[0-7]{11}\0", field) else 0
    if header != header_of(name, size):
        raise source.error(difference(header, name, size, set()))
    if size > MAX_DOCUMENT:
        raise source.error(f"{name} has {size} bytes; {MAX_DOCUMENT} are allowed")
    data = source.exactly(size)
    _skip_padding(source, size)
    return data


def _unpack_member(source: _Source, entry: FileEntry, root: Path, seen: set[str]) -> None:
    header = source.exactly(BLOCK)
    if header != header_of(entry.path, entry.size):
        raise source.error(difference(header, entry.path, entry.size, seen))
    target = root / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        size, digest = copy_exactly(source, entry.size, file)
    if size != entry.size:
        raise source.error(f"it is cut off in {entry.path}")
    if digest != entry.sha256:
        raise source.error(f"{entry.path} was altered: it has another hash")
    _skip_padding(source, size)


def _skip_padding(source: _Source, size: int) -> None:
    if any(source.exactly(padded(size) - size)):
        raise source.error("something stands between two files")


def _check_place(out: Path, bundle: Path) -> None:
    """Refuse to replace what no packed bundle is, or to write into the bundle that is packed.

    Raises:
        OutputError: It is one of these.
    """
    if out.is_relative_to(bundle):
        raise OutputError(f"{out} lies in the bundle that is to be packed", "choose another place")
    with output_errors(out):
        if not os.path.lexists(out):
            return
        if out.is_file():
            with out.open("rb") as file:
                if file.read(4) in (b"", zstandard.FRAME_HEADER):
                    return
    raise OutputError(f"{out} exists and is no packed bundle", "choose another place, or delete it first")


def _members(bundle: Bundle) -> tuple[FileEntry, ...]:
    documents = []
    for name in (MANIFEST_NAME, PROOF_NAME):
        with open_plain(bundle.path, name) as file:
            documents.append(FileEntry(name, *copy_exactly(file, MAX_DOCUMENT)))
    if f"sha256:{documents[0].sha256}" != bundle.digest:
        raise IntegrityError(f"{bundle.path} was replaced by another bundle meanwhile", "pack it again")
    rest = sorted((*bundle.manifest.files, *bundle.proof.files), key=lambda entry: entry.path)
    return (*documents, *rest)


def _pack_member(root: Path, entry: FileEntry, sink: Writable) -> None:
    sink.write(header_of(entry.path, entry.size))
    with open_plain(root, entry.path) as file:
        found = copy_exactly(file, entry.size, sink)
    if found != (entry.size, entry.sha256):
        raise IntegrityError(f"{root}: {entry.path} was altered: it has another hash", "get the bundle again")
    sink.write(bytes(padded(entry.size) - entry.size))


def _parameters(total: int) -> zstandard.ZstdCompressionParameters:
    """How so many bytes are compressed."""
    return zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=total, min_match=_MIN_MATCH, write_checksum=True, write_content_size=True
    )


def _is_bomb(total: int, packed: int) -> bool:
    return total > FREE_BYTES and total > MAX_RATIO * packed
