"""Packing and unpacking."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
import zstandard
from bundle_builders import a_manifest, a_proof, leftovers, members_of, names, stage, tar_of, tree, write_bundle

from artifacts.bundle import BundleWriter, WeightStore, open_bundle
from artifacts.errors import BundleError, IntegrityError, OutputError, PackError
from artifacts.pack import measure, pack, unpack
from artifacts.ustar import header_of


def test_round_trip(tmp_path):
    bundle = write_bundle(tmp_path / "out")
    assert pack(tmp_path / "out", tmp_path / "a.hasten") == bundle
    unpacked = unpack(tmp_path / "a.hasten", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert unpacked == open_bundle(tmp_path / "again")
    assert unpacked.digest == bundle.digest
    assert names(tmp_path) == ["a.hasten", "again", "out"]


def test_the_same_bundle_gives_the_same_bytes(tmp_path):
    write_bundle(tmp_path / "one")
    write_bundle(tmp_path / "two")
    os.utime(tmp_path / "two/plan.toml", (1, 1))
    (tmp_path / "two/plan.toml").chmod(0o600)
    pack(tmp_path / "one", tmp_path / "1.hasten")
    pack(tmp_path / "two", tmp_path / "2.hasten")
    assert (tmp_path / "1.hasten").read_bytes() == (tmp_path / "2.hasten").read_bytes()


def test_other_tools_read_it(tmp_path):
    bundle = write_bundle(tmp_path / "out")
    pack(tmp_path / "out", tmp_path / "a.hasten")
    with (tmp_path / "a.hasten").open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        data = stream.read()
    assert data == tar_of(members_of(bundle))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        modes = {(member.mode, member.uid, member.gid, member.mtime, member.uname) for member in tar.getmembers()}
    assert found == tree(tmp_path / "out")
    assert list(found)[:2] == ["manifest.json", "proof.json"]
    assert modes == {(0o644, 0, 0, 0, "")}


@pytest.mark.parametrize(
    "path", ["a", "b" * 100, f"{'c' * 49}/{'d' * 100}", f"{'e' * 60}/{'f' * 60}/{'g' * 28}", f"a/{'h' * 98}/i"]
)
@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11, 1 << 44])
def test_headers_are_read_by_others(path, size):
    header = header_of(path, size)
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (info.name, info.size, info.type) == (path, size, tarfile.REGTYPE)
    if size < 8**11:
        info.mode = 0o644
        assert header == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_pack_is_replaced_and_nothing_else(tmp_path):
    write_bundle(tmp_path / "out")
    place = tmp_path / "a.hasten"
    place.write_bytes(b"my thesis")
    with pytest.raises(OutputError, match="no packed bundle"):
        pack(tmp_path / "out", place)
    assert place.read_bytes() == b"my thesis"
    place.unlink()
    pack(tmp_path / "out", place)
    pack(tmp_path / "out", place)
    with pytest.raises(OutputError, match="no packed bundle"):
        pack(tmp_path / "out", tmp_path)
    with pytest.raises(OutputError, match="lies in the bundle"):
        pack(tmp_path / "out", tmp_path / "out/a.hasten")
    with pytest.raises(OutputError, match="does not exist"):
        pack(tmp_path / "out", tmp_path / "absent/a.hasten")
    assert leftovers(place) == []


def test_a_damaged_bundle_is_not_packed(tmp_path):
    write_bundle(tmp_path / "out")
    (tmp_path / "out/golden.npz").write_bytes(b"goldeN" * 100)
    with pytest.raises(IntegrityError, match=r"golden\.npz was altered"):
        pack(tmp_path / "out", tmp_path / "a.hasten")
    assert names(tmp_path) == ["out"]


def test_what_would_be_taken_for_a_bomb_is_not_packed(tmp_path):
    write_bundle(tmp_path / "out", "\0\0\0", weight_bytes=20 << 20)
    with pytest.raises(PackError, match="bomb"):
        pack(tmp_path / "out", tmp_path / "a.hasten")
    assert names(tmp_path) == ["out"]


def test_what_packing_saves(tmp_path):
    bundle = write_bundle(tmp_path / "out")
    pack(tmp_path / "out", tmp_path / "a.hasten")
    found = measure(bundle, tmp_path / "a.hasten")
    files = tree(tmp_path / "out")
    weights = b"".join(data for path, data in files.items() if path.startswith("weights/"))
    assert (found.size, found.weights) == (sum(map(len, files.values())), len(weights))
    assert found.zeros == weights.count(0)
    assert found.packed == (tmp_path / "a.hasten").stat().st_size
    with pytest.raises(BundleError, match="cannot be read"):
        measure(bundle, tmp_path / "absent.hasten")


@pytest.mark.parametrize(("kind", "most"), [(np.int8, 0.72), (np.float32, 0.62)])
def test_zeros_are_not_stored(tmp_path, kind, most):
    """Half a million elements of a normal distribution, half of them pruned, against all of them."""
    generator = np.random.default_rng(0)
    dense = (generator.normal(size=1 << 19) * 28).clip(-127, 127).astype(kind)
    pruned = np.where(np.abs(dense) < np.median(np.abs(dense)), 0, dense).astype(kind)
    sizes = []
    for name, weight in (("dense", dense), ("pruned", pruned)):
        with BundleWriter(tmp_path / name) as writer:
            held = WeightStore(writer.staging / "weights").put(weight.tobytes()).path
            bundle = writer.commit(a_manifest((held, *stage(writer, "x"))), a_proof(), ("report.html",))
        packed = tmp_path / f"{name}.hasten"
        pack(tmp_path / name, packed)
        found = measure(bundle, packed)
        sizes.append(found.packed)
        unpack(packed, tmp_path / f"{name}-again")
        assert tree(tmp_path / f"{name}-again") == tree(tmp_path / name)
    assert found.zeros / found.weights > 0.45
    assert sizes[1] < most * sizes[0]


def test_unpacking_over_something(tmp_path):
    write_bundle(tmp_path / "out", "new")
    pack(tmp_path / "out", tmp_path / "a.hasten")
    place = tmp_path / "place"
    write_bundle(place, "old")
    unpack(tmp_path / "a.hasten", place)
    assert tree(place) == tree(tmp_path / "out")
    (place / "notes").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        unpack(tmp_path / "a.hasten", place)
    assert (place / "notes").exists()
    unpack(tmp_path / "a.hasten", place, force=True)
    assert tree(place) == tree(tmp_path / "out")
    assert leftovers(place) == []


def test_what_is_no_pack(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "empty", "absent", "."):
        with pytest.raises(PackError):
            unpack(tmp_path / name, tmp_path / "out")
    assert names(tmp_path) == ["empty", "text"]
