"""Every MUST of docs/format.md on packed bundles, broken."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from pathlib import Path

import pytest
import zstandard
from bundle_builders import compressed, members_of, names, sealed, tar_of, tree, write_bundle

from artifacts.bundle import Bundle
from artifacts.digest import sha256_bytes
from artifacts.errors import BundleError, OutputError, PackError
from artifacts.pack import pack, unpack
from artifacts.ustar import header_of, padded

Members = list[tuple[str, bytes]]


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "source").mkdir()
    return write_bundle(tmp_path / "source/out")


@pytest.fixture
def members(bundle):
    return members_of(bundle)


@pytest.fixture
def refuse(tmp_path):
    """Unpack some bytes over an old bundle: they are refused, and it stands as it was (K7)."""
    place = tmp_path / "place"
    place.mkdir()
    write_bundle(place / "out", "old")
    before = tree(place)

    def refused(data: bytes, match: str, kind: type[BundleError] = PackError) -> None:
        (tmp_path / "a.hasten").write_bytes(data)
        with pytest.raises(kind, match=match) as raised:
            unpack(tmp_path / "a.hasten", place / "out")
        assert str(raised.value).isprintable()
        assert tree(place) == before
        assert names(place) == ["out"]

    return refused


def test_what_is_altered_here_is_sound(bundle, members, tmp_path):
    (tmp_path / "a.hasten").write_bytes(compressed(tar_of(members)))
    assert unpack(tmp_path / "a.hasten", tmp_path / "out").digest == bundle.digest


def test_k1_frame(members, refuse, bundle, tmp_path):
    tar = tar_of(members)
    good = compressed(tar)
    refuse(tar, "zstd")
    refuse(b"\x1f\x8b" + good, "zstd")
    refuse(good + b"\0", "something comes after the end")
    refuse(good + good, "something comes after the end")
    refuse(good + b"\x50\x2a\x4d\x18\4\0\0\0evil", "something comes after the end")  # a skippable frame
    refuse(compressed(tar[:700]) + compressed(tar[700:]), "cut off")
    for position in range(5, len(good), 97):  # byte 4 has a bit that says nothing
        altered = bytearray(good)
        altered[position] ^= 0x10
        refuse(bytes(altered), "a.hasten", BundleError)
    wide = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    noise = zstandard.ZstdCompressor(compression_params=wide).compressobj()  # of unknown size: the window is kept
    refuse(noise.compress(tar) + noise.flush(), "zstd.*memory")


def test_k2_form(members, refuse):
    refuse(compressed(tar_of(members[1:])), "where manifest.json must come")
    refuse(compressed(tar_of([members[1], members[0], *members[2:]])), "where manifest.json must come")
    refuse(compressed(tar_of([*members[:2], *reversed(members[2:])])), "must come; it is not listed or misplaced")
    tar = tar_of(members)
    refuse(compressed(tar + bytes(512)), "comes after the last file")
    refuse(compressed(tar + b"evil"), "comes after the last file")
    refuse(compressed(tar[:-1] + b"x"), "comes after the last file")
    refuse(compressed(tar[:-512]), "cut off")
    padding = 512 + len(members[0][1])
    assert tar[padding] == 0
    refuse(compressed(tar[:padding] + b"x" + tar[padding + 1 :]), "something stands between two files")
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    refuse(compressed(other.getvalue()), "not of the form that hasten pack writes")


def test_k2_every_byte_of_a_header(members, refuse):
    tar = tar_of(members)
    second = 512 + padded(len(members[0][1]))
    third = second + 512 + padded(len(members[1][1]))
    for start in (0, second, third):
        for position in range(start, start + 512, 19):
            altered = bytearray(tar)
            altered[position] ^= 2
            refuse(compressed(bytes(altered)), "no sound packed bundle")


def test_k3_contents(members, refuse):
    name, data = members[3]
    altered = bytes([data[0] ^ 1]) + data[1:]
    refuse(compressed(tar_of([*members[:3], (name, altered), *members[4:]])), f"{name} was altered")
    refuse(compressed(tar_of([*members[:3], (name, data[:-1]), *members[4:]])), f"{name} has not the")
    refuse(compressed(tar_of([*members[:3], (name, data + b"\0" * 600), *members[4:]])), f"{name} has not the")
    refuse(compressed(tar_of([*members[:3], *members[4:]])), f"where {name} must come")
    refuse(compressed(tar_of(members[:-1])), "it ends before")
    refuse(compressed(tar_of([*members[:4], ("evil.py", b"x"), *members[4:]])), "'evil.py' stands where")
    refuse(compressed(tar_of([*members, ("evil.py", b"x")])), "comes after the last file")


def member(kind: bytes, name: str, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (member(tarfile.SYMTYPE, "cpu-fp32.onnx", "/etc/passwd"), "is a link"),
        (member(tarfile.LNKTYPE, "cpu-fp32.onnx", "manifest.json"), "is a hard link"),
        (member(tarfile.CHRTYPE, "cpu-fp32.onnx"), "is a device"),
        (member(tarfile.BLKTYPE, "cpu-fp32.onnx"), "is a device"),
        (member(tarfile.FIFOTYPE, "cpu-fp32.onnx"), "is a pipe"),
        (member(tarfile.DIRTYPE, "processor"), "is a folder"),
        (member(b"x", "PaxHeaders/x"), "is an extended header"),
        (member(b"L", "././@LongLink"), "is an extended header"),
        (member(b"S", "cpu-fp32.onnx"), "not of the form|has not the"),
        (header_of("../escape", 1), "part '..'"),
        (header_of("processor/../../escape", 1), "part '..'"),
        (header_of("/etc/cron.d/x", 1), "absolute path"),
        (header_of("..\\escape", 1), "no portable path"),
        (header_of("C:x", 1), "absolute path"),
        (header_of("manifest.json", 1), "'manifest.json' stands twice"),
        (header_of("proof.json", 1), "'proof.json' stands twice"),
        (header_of("x\x1b[31m", 1), "no portable path"),
    ],
)
def test_k4_members(members, refuse, tmp_path, header, match):
    front = tar_of(members[:2])[:-1024]
    refuse(compressed(front + header + tar_of(members[2:])), match)
    assert not list(tmp_path.rglob("escape"))


def test_k4_duplicates(members, refuse):
    refuse(compressed(tar_of([*members[:3], members[2], *members[3:]])), f"'{members[2][0]}' stands twice")
    refuse(compressed(tar_of([members[0], members[0], *members[1:]])), r"where proof\.json must come")


def test_k5_cut_off(bundle, members, refuse, tmp_path):
    pack(bundle.path, tmp_path / "good.hasten")
    good = (tmp_path / "good.hasten").read_bytes()
    for length in (*range(0, 20), *range(20, len(good), 101), *range(len(good) - 8, len(good))):
        refuse(good[:length], "cut off")
    tar = tar_of(members)
    for length in (*range(0, len(tar), 3001), len(tar) - 1):
        refuse(compressed(tar[:length]), "cut off")


def claiming(bundle: Bundle, size: int) -> Members:
    """A packed bundle whose manifest states a big file."""
    members = members_of(bundle)
    document = json.loads(members[0][1])
    entry = next(entry for entry in document["files"] if entry["path"] == "golden.npz")
    entry["size"] = size
    manifest = json.dumps(document).encode()
    payload = json.loads(members[1][1])["payload"]
    payload["bundle"] = f"sha256:{sha256_bytes(manifest)}"
    return [("manifest.json", manifest), ("proof.json", sealed(payload)), *members[2:]]


def test_k6_bombs(bundle, refuse, tmp_path):
    zeros = zstandard.ZstdCompressor(level=3).compressobj()
    members = claiming(bundle, 1 << 30)
    start = b"".join(header_of(name, len(data)) + data.ljust(padded(len(data)), b"\0") for name, data in members[:4])
    bomb = zeros.compress(start + header_of("golden.npz", 1 << 30))
    bomb += b"".join(zeros.compress(bytes(1 << 24)) for _ in range(64)) + zeros.flush()
    assert len(bomb) < 1 << 20
    refuse(bomb, "a bomb")
    # Stated small and sent big: what is not stated is never read.
    small = zstandard.ZstdCompressor(level=3).compressobj()
    data = small.compress(tar_of(members_of(bundle))) + b"".join(small.compress(bytes(1 << 24)) for _ in range(64))
    refuse(data + small.flush(), "comes after the last file")
    for name in ("manifest.json", "proof.json"):
        front = b"" if name == "manifest.json" else tar_of(members_of(bundle)[:1])[:-1024]
        for size in (17 << 20, 8**11 - 1):
            refuse(compressed(front + header_of(name, size) + bytes(1000)), f"{name} has {size} bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20, "KiB: nothing was inflated in memory"


def test_k6_more_than_the_disk_has(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("artifacts.pack.FREE_BYTES", 1 << 62)
    (tmp_path / "a.hasten").write_bytes(compressed(tar_of(claiming(bundle, 1 << 44))))
    with pytest.raises(OutputError, match=r"the disk of .* has less"):
        unpack(tmp_path / "a.hasten", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_k7_nothing_is_left(members, refuse, tmp_path):
    tar = tar_of(members)
    refuse(compressed(tar[: len(tar) // 2]), "cut off")
    absent = tmp_path / "absent"
    absent.mkdir()
    with pytest.raises(PackError):
        unpack(tmp_path / "a.hasten", absent / "out")
    assert names(absent) == []


def test_k7_documents_are_held_to_their_musts(members, refuse):
    def manifest(data: bytes) -> bytes:
        return compressed(tar_of([("manifest.json", data), *members[1:]]))

    refuse(manifest(b"{}"), "schema: missing", BundleError)
    refuse(manifest(b'{"schema": 2}'), "upgrade hasten", BundleError)
    refuse(manifest(b'{"schema": NaN}'), "NaN", BundleError)
    altered = members[0][1].replace(b'"tolerance": 0.05', b'"tolerance": 0.95')
    refuse(manifest(altered), r"proof\.json speaks of", BundleError)
    payload = json.loads(members[1][1])["payload"]
    payload["files"] = [{"path": "cpu-int8.onnx", "size": 1, "sha256": "0" * 64}]
    clash = [members[0], ("proof.json", sealed(payload)), *members[2:]]
    refuse(compressed(tar_of(clash)), "stands twice", BundleError)


def test_unpack_through_links(bundle, tmp_path):
    pack(bundle.path, tmp_path / "a.hasten")
    (tmp_path / "link.hasten").symlink_to("a.hasten")
    assert unpack(tmp_path / "link.hasten", tmp_path / "out").digest == bundle.digest
    os.mkfifo(tmp_path / "pipe.hasten")
    with pytest.raises(PackError, match="is no file"):
        unpack(tmp_path / "pipe.hasten", Path(tmp_path / "other"))
