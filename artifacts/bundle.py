"""A bundle on disk: opened with every MUST of docs/format.md held, written so that it is never seen half done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from .constraints import path_problem, shown
from .digest import sha256_bytes
from .errors import BundleError, IntegrityError, OutputError
from .manifest import MANIFEST_NAME, PROOF_NAME, WEIGHTS, FileEntry, Manifest, Variant, check_files
from .proof import Proof
from .strict import MAX_DOCUMENT, At
from .swap import Staging, output_errors, remove
from .tree import copy_exactly, open_plain, read_bounded, reading_errors, scan
from .weights import WeightStore

__all__ = [
    "Bundle",
    "BundleWriter",
    "WeightStore",
    "check_hash",
    "check_proof",
    "check_replaceable",
    "open_bundle",
    "open_hashing",
]

PACK_SUFFIX = ".hasten"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_RETRIES = 3


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        manifest: What it is.
        proof: What was measured on it.
        digest: ``sha256:…`` of manifest.json: the identity of its content.
    """

    path: Path
    manifest: Manifest
    proof: Proof
    digest: str

    def variant(self, identity: str) -> Variant:
        """The variant of that id.

        Raises:
            BundleError: There is none.
        """
        for variant in self.manifest.variants:
            if variant.id == identity:
                return variant
        known = ", ".join(variant.id for variant in self.manifest.variants)
        raise BundleError(f"{self.path} has no variant {shown(identity)}", f"Choose one of {known}")

    def size(self, identity: str) -> int:
        """Bytes of the graph and the weights of a variant.

        Raises:
            BundleError: There is no such variant.
        """
        variant = self.variant(identity)
        parts = {variant.model, *variant.weights}
        return sum(entry.size for entry in self.manifest.files if entry.path in parts)

    def with_proof(self, proof: Proof, extra: Mapping[str, bytes]) -> Bundle:
        """The bundle with other evidence: at once, or not at all. The content and the digest stay.

        Args:
            proof: What was measured; its ``bundle`` and ``files`` are filled in here.
            extra: Other evidence by path, such as report.html; what was there before goes.

        Raises:
            BundleError: The bundle on disk is no longer this one, or the evidence breaks a MUST of docs/format.md.
            OutputError: It cannot be written.
        """
        self.check_still_there()
        evidence = tuple(FileEntry(name, len(data), sha256_bytes(data)) for name, data in sorted(extra.items()))
        data = replace(proof, bundle=self.digest, files=evidence).to_json()
        proven = replace(self, proof=Proof.parse(data))
        check_proof(proven)
        with Staging(self.path) as staging:
            with output_errors(self.path):
                for name in (MANIFEST_NAME, *(entry.path for entry in self.manifest.files)):
                    _link(self.path / name, _target(staging.path, name))
                for name, content in (*extra.items(), (PROOF_NAME, data)):
                    _write_new(_target(staging.path, name), content)
            self.check_still_there()
            staging.swap()
        return proven

    def check_still_there(self) -> None:
        """Refuse to go on with a bundle in whose place another lies by now.

        Raises:
            BundleError: One does, or none.
        """
        if open_bundle(self.path, verify=False).digest != self.digest:
            raise IntegrityError(f"{self.path} was replaced by another bundle meanwhile", "open it again")


def open_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Open a bundle. Nothing in it is executed.

    Args:
        path: Its folder.
        verify: Also compare the hash of every file, not only its presence and size.

    Raises:
        SchemaError: manifest.json or proof.json breaks a MUST of docs/format.md, or a newer hasten made it.
        IntegrityError: A file is missing, not listed, a link, or has another size or hash than stated.
        BundleError: There is no bundle.
    """
    return open_hashing(Path(path), lambda _: verify)


def open_hashing(path: Path, wanted: Callable[[str], bool]) -> Bundle:
    """As `open_bundle`, but only of files whose path is wanted is the hash compared."""
    for _ in range(_RETRIES):
        before = _identity(path)
        try:
            bundle = _open(path, wanted)
        except BundleError:
            # A writer may have put another bundle in this place while we read.
            if before == _identity(path):
                raise
        else:
            if before == _identity(path):
                return bundle
    return _open(path, wanted)


class BundleWriter:
    """Writes a bundle into a staging folder beside its place, and puts it there at once. A context manager.

    Leaving it without `commit`, by an error or not, leaves the place as it was.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        """Check the place; nothing is written yet.

        Args:
            out: Where the bundle is to be: nothing, an empty folder, or a bundle that it replaces.
            force: Replace whatever else is there.

        Raises:
            OutputError: It may not be there.
        """
        self._staging = Staging(Path(out))
        self._force = force
        check_replaceable(self._staging.out, force=force)

    @property
    def staging(self) -> Path:
        """The folder to write into; there inside the context."""
        return self._staging.path

    def __enter__(self) -> BundleWriter:
        """Make the staging folder, after deleting what killed writers left."""
        self._staging.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the staging folder."""
        self._staging.__exit__(kind, error, trace)

    def add_file(self, relative: str, source: Path) -> None:
        """Copy a file, or what a link leads to, into the bundle.

        Raises:
            OutputError: It cannot be copied, or may not have that path.
        """
        with output_errors(self._staging.out):
            shutil.copyfile(source, _target(self.staging, relative))

    def add_bytes(self, relative: str, data: bytes) -> None:
        """Write a file of the bundle.

        Raises:
            OutputError: It cannot be written, or may not have that path.
        """
        with output_errors(self._staging.out):
            _target(self.staging, relative).write_bytes(data)

    def commit(self, manifest: Manifest, proof: Proof, measured: tuple[str, ...] = ()) -> Bundle:
        """Make what is staged the bundle. Weights that no variant refers to, and empty folders, are left out.

        Args:
            manifest: What it is; ``files`` is filled in here.
            proof: What was measured; ``bundle`` and ``files`` are filled in here.
            measured: Staged files that are evidence and not content, such as report.html.

        Raises:
            OutputError: It cannot be written; the place is as it was.
            SchemaError: The bundle would break a MUST of docs/format.md.
        """
        with output_errors(self._staging.out):
            entries = self._entries(manifest)
            for name in measured:
                if name not in entries:
                    raise OutputError(f"the evidence {name} was not staged")
            content = tuple(entry for name, entry in entries.items() if name not in measured)
            data = replace(manifest, files=content).to_json()
            digest = f"sha256:{sha256_bytes(data)}"
            evidence = tuple(entries[name] for name in sorted(measured))
            proven = replace(proof, bundle=digest, files=evidence).to_json()
            bundle = Bundle(self._staging.out, Manifest.parse(data), Proof.parse(proven), digest)
            check_proof(bundle)
            (self.staging / MANIFEST_NAME).write_bytes(data)
            (self.staging / PROOF_NAME).write_bytes(proven)
        check_replaceable(self._staging.out, force=self._force)
        self._staging.swap()
        remove(self.staging)
        return bundle

    def _entries(self, manifest: Manifest) -> dict[str, FileEntry]:
        """What is staged, sorted by path. Weights were hashed when they were written, and are named by it."""
        used = {path for variant in manifest.variants for path in variant.weights}
        files, folders = scan(self.staging)
        entries = {}
        for name in sorted(files):
            if match := WEIGHTS.fullmatch(name):
                if name in used:
                    entries[name] = FileEntry(name, files[name], match[1])
                else:
                    (self.staging / name).unlink()
                continue
            with open_plain(self.staging, name) as file:
                entries[name] = FileEntry(name, *copy_exactly(file, files[name]))
        for folder in sorted(folders - _parents(entries), reverse=True):
            (self.staging / folder).rmdir()
        return entries


def check_replaceable(out: Path, *, force: bool) -> None:
    """Refuse to replace what may be dear to somebody.

    Raises:
        OutputError: Neither nothing, an empty folder nor a bundle is there, and it is not forced; or it is forced, and
            is the home or working folder, or one above.
    """
    with output_errors(out):
        if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
            return
    try:
        open_bundle(out, verify=False)
    except BundleError as error:
        if not force:
            remedy = "choose another place, or pass --force to replace it with all that is in it"
            raise OutputError(f"{out} exists and is no sound bundle ({error.what})", remedy) from error
    else:
        return
    with output_errors(out):
        dear_ones = ((os.path.expanduser("~"), "your home folder"), (Path.cwd(), "the working folder"))  # noqa: PTH111
    for dear, name in dear_ones:
        if Path(os.path.realpath(dear)).is_relative_to(out):
            raise OutputError(f"{out} is {name} or holds it, and is not replaced even by force", "choose another place")


def _open(path: Path, wanted: Callable[[str], bool]) -> Bundle:
    _check_folder(path)
    with reading_errors(path):
        data = read_bounded(path, MANIFEST_NAME, MAX_DOCUMENT)
        manifest = Manifest.parse(data)
        files, folders = scan(path)
        if PROOF_NAME not in files:
            raise IntegrityError(f"{path}: {PROOF_NAME} is missing")
        proof = Proof.parse(read_bounded(path, PROOF_NAME, MAX_DOCUMENT))
        bundle = Bundle(path, manifest, proof, f"sha256:{sha256_bytes(data)}")
        check_proof(bundle)
        listed = {entry.path: entry for entry in (*manifest.files, *proof.files)}
        _check_presence(path, listed, files, folders)
        for entry in listed.values():
            if wanted(entry.path):
                check_hash(path, entry)
    return bundle


def _check_folder(path: Path) -> None:
    with reading_errors(path):
        if not path.exists():
            raise BundleError(f"{path} does not exist", f"Make it with: hasten compile SOURCE -o {path}")
        if path.is_file():
            with path.open("rb") as file:
                packed = file.read(4) == ZSTD_MAGIC
            if packed or path.suffix == PACK_SUFFIX:
                raise BundleError(f"{path} is a packed bundle", f"run: hasten unpack {path}")
        if not path.is_dir():
            raise BundleError(f"{path} is no folder", "a bundle is the folder that hasten compile wrote")
        if not os.path.lexists(path / MANIFEST_NAME):
            hint = " It looks like a model: compile it first" if (path / "config.json").exists() else ""
            remedy = f"a bundle is the folder that hasten compile wrote.{hint}"
            raise BundleError(f"{path} is no bundle: it has no {MANIFEST_NAME}", remedy)


def check_proof(bundle: Bundle) -> None:
    """Hold proof.json to the manifest beside it.

    Raises:
        IntegrityError: It speaks of another bundle.
        SchemaError: It names a variant that there is not, or a file of the content.
    """
    at = At(PROOF_NAME).field("payload")
    if bundle.proof.bundle != bundle.digest:
        raise IntegrityError(
            f"{bundle.path}: {PROOF_NAME} speaks of {bundle.proof.bundle}, and {MANIFEST_NAME} is {bundle.digest}",
            "one of them was altered; compile again, or get the bundle again",
        )
    known = {variant.id for variant in bundle.manifest.variants}
    for index, proof in enumerate(bundle.proof.variants):
        if proof.variant not in known:
            raise at.field("variants").item(index).error(f"there is no variant {shown(proof.variant)}")
    check_files((*bundle.manifest.files, *bundle.proof.files), at.field("files"))


def _check_presence(
    path: Path, listed: Mapping[str, FileEntry], files: Mapping[str, int], folders: frozenset[str]
) -> None:
    for name, entry in listed.items():
        if name not in files:
            raise IntegrityError(f"{path}: {name} is missing", "get the bundle again")
        if files[name] != entry.size:
            raise IntegrityError(f"{path}: {name} has {files[name]} bytes, not {entry.size}", "get the bundle again")
    for name in sorted(files.keys() - listed.keys() - {MANIFEST_NAME, PROOF_NAME}):
        raise IntegrityError(f"{path}: {shown(name)} is not listed", "delete it if you know where it came from")
    for name in sorted(folders - _parents(listed)):
        raise IntegrityError(f"{path}: no listed file is in the folder {shown(name)}", "delete it")


def check_hash(path: Path, entry: FileEntry) -> None:
    """Hold a file of a bundle to its size and hash.

    Raises:
        IntegrityError: It has others, or is no plain file.
        OSError: It cannot be read.
    """
    with open_plain(path, entry.path) as file:
        # One byte more than stated: a file that grows meanwhile is refused too.
        found = copy_exactly(file, entry.size + 1)
    if found != (entry.size, entry.sha256):
        raise IntegrityError(
            f"{path}: {entry.path} was altered: its hash is not the one stated", "get the bundle again"
        )


def _parents(names: Mapping[str, object]) -> set[str]:
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _target(root: Path, relative: str) -> Path:
    """Where a file of a bundle goes; its folder is made.

    Raises:
        OutputError: No file of a bundle may have that path.
        OSError: The folder cannot be made.
    """
    if problem := path_problem(relative):
        raise OutputError(f"a file of a bundle cannot have this path: {problem}")
    target = root / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # Not every file system has hard links, and not every user may make one.
        shutil.copyfile(source, target)


def _write_new(target: Path, data: bytes) -> None:
    # Never into a file that is there: it may be a hard link to one of the old bundle.
    with target.open("xb") as file:
        file.write(data)
