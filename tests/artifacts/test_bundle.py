"""Writing and opening bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundle_builders import a_manifest, a_proof, leftovers, names, stage, tree, write_bundle

from artifacts.bundle import BundleWriter, WeightStore, open_bundle
from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import BundleError, IntegrityError, OutputError, SchemaError


def test_written_and_opened(tmp_path):
    out = tmp_path / "out"
    written = write_bundle(out)
    opened = open_bundle(out)
    assert opened == written
    assert opened.digest == f"sha256:{sha256_file(out / 'manifest.json')}"
    assert opened.proof.bundle == opened.digest
    assert [entry.path for entry in opened.proof.files] == ["report.html"]
    names = {entry.path for entry in opened.manifest.files}
    assert names == set(tree(out)) - {"manifest.json", "proof.json", "report.html"}
    assert leftovers(out) == []


def test_opened_by_text_and_through_a_link(tmp_path):
    written = write_bundle(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    assert open_bundle(str(tmp_path / "link")).digest == written.digest


def test_the_same_files_give_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_bundle(one)
    with BundleWriter(two) as writer:
        for variant in ("cpu-int8", "cpu-fp32"):
            writer.add_bytes(f"{variant}.onnx", f"graph {variant} one".encode())
        weights = stage(writer, "one")
        writer.commit(a_manifest(weights), a_proof(), ("report.html",))
    assert tree(one) == tree(two)


def test_evidence_is_outside_the_digest(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    first = write_bundle(one)
    with BundleWriter(two) as writer:
        weights = stage(writer, "one")
        writer.add_bytes("report.html", b"<html>other")
        second = writer.commit(a_manifest(weights), a_proof(0.5), ("report.html",))
    assert first.digest == second.digest
    assert first.proof != second.proof


def test_size_counts_graph_and_weights_once(tmp_path):
    bundle = write_bundle(tmp_path / "out")
    graph = len(b"graph cpu-int8 one")
    assert bundle.size("cpu-int8") == graph + 20_000
    assert bundle.size("cpu-fp32") == graph + 40_000
    with pytest.raises(BundleError, match="Choose one of cpu-fp32, cpu-int8"):
        bundle.variant("gpu")


def test_weights_are_written_once(tmp_path):
    store = WeightStore(tmp_path / "weights")
    array = np.arange(5000, dtype=np.float32).reshape(50, 100)
    entry = store.put(memoryview(array))
    again = store.put(array.tobytes())
    assert entry == again
    assert entry.path == f"weights/{entry.sha256}.bin"
    assert entry.size == array.nbytes
    assert (tmp_path / entry.path).read_bytes() == array.tobytes()
    assert len(names(store.directory)) == 1
    assert store.put(memoryview(array.T)).sha256 == sha256_bytes(array.T.tobytes())
    assert store.put(b"").size == 0
    assert store.put(memoryview(np.zeros((0, 3)))).size == 0


def test_weights_nobody_refers_to_are_left_out(tmp_path):
    out = tmp_path / "out"
    with BundleWriter(out) as writer:
        weights = stage(writer, "one")
        WeightStore(writer.staging / "weights").put(b"of a pass that was reverted")
        (writer.staging / "empty" / "folder").mkdir(parents=True)
        bundle = writer.commit(a_manifest(weights), a_proof(), ("report.html",))
    assert open_bundle(out) == bundle
    assert len(names(out / "weights")) == 2
    assert not (out / "empty").exists()


def test_a_bundle_without_weights_files(tmp_path):
    with BundleWriter(tmp_path / "out") as writer:
        stage(writer, "one")
        writer.commit(a_manifest(()), a_proof(), ("report.html",))
    assert "weights" not in names(tmp_path / "out")
    open_bundle(tmp_path / "out")


def test_add_file_copies_what_a_link_leads_to(tmp_path):
    (tmp_path / "real").write_bytes(b"vocabulary")
    (tmp_path / "link").symlink_to("real")
    with BundleWriter(tmp_path / "out") as writer:
        writer.add_file("processor/vocab.txt", tmp_path / "link")
        assert not (writer.staging / "processor/vocab.txt").is_symlink()
        assert (writer.staging / "processor/vocab.txt").read_bytes() == b"vocabulary"
        with pytest.raises(OutputError, match="cannot be written"):
            writer.add_file("processor/other", tmp_path / "absent")
        with pytest.raises(OutputError, match=r"part '\.\.'"):
            writer.add_bytes("../escape", b"")


def test_leaving_without_commit_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with BundleWriter(out) as writer:
        stage(writer, "one")
    assert names(tmp_path) == []

    def interrupted():
        with BundleWriter(out) as writer:
            stage(writer, "one")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_what_would_break_a_must_is_not_written(tmp_path):
    out = tmp_path / "out"
    old = write_bundle(out)
    for broken, match in (
        (lambda weights: replace(a_manifest(weights), name=""), "name"),
        (lambda weights: a_manifest((*weights, f"weights/{'f' * 64}.bin")), "not listed in files"),
    ):
        with BundleWriter(out) as writer:
            weights = stage(writer, "two")
            with pytest.raises(SchemaError, match=match):
                writer.commit(broken(weights), a_proof(), ("report.html",))
    with BundleWriter(out) as writer:
        weights = stage(writer, "two")
        with pytest.raises(OutputError, match=r"other\.html was not staged"):
            writer.commit(a_manifest(weights), a_proof(), ("other.html",))
        (writer.staging / "link").symlink_to("plan.toml")
        with pytest.raises(IntegrityError, match="a link"):
            writer.commit(a_manifest(weights), a_proof(), ("report.html",))
    assert open_bundle(out) == old
    assert leftovers(out) == []


def test_a_bundle_and_an_empty_folder_are_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    one = write_bundle(out)
    two = write_bundle(out, "two")
    assert one.digest != two.digest
    assert open_bundle(out) == two
    assert leftovers(out) == []


def test_a_linked_place_is_replaced_where_the_link_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    bundle = write_bundle(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "real").digest == bundle.digest


def foreign_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("three years of work")


def foreign_file(out: Path) -> None:
    out.write_text("thesis")


def foreign_extension(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')


def bundle_with_notes(out: Path) -> None:
    write_bundle(out)
    (out / "notes.txt").write_text("mine")


@pytest.mark.parametrize("make", [foreign_folder, foreign_file, foreign_extension, bundle_with_notes])
def test_what_is_not_ours_is_replaced_only_by_force(tmp_path, make):
    out = tmp_path / "out"
    make(out)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="--force"):
        BundleWriter(out)
    assert tree(tmp_path) == before
    bundle = write_bundle(out, force=True)
    assert open_bundle(out) == bundle
    assert names(tmp_path) == ["out"]


def test_what_appears_while_we_write_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with BundleWriter(out) as writer:
        weights = stage(writer, "one")
        foreign_folder(out)
        with pytest.raises(OutputError, match="--force"):
            writer.commit(a_manifest(weights), a_proof(), ("report.html",))
    assert names(tmp_path) == ["out"]
    assert names(out) == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "below/and/below"])
def test_the_working_folder_is_not_replaced_even_by_force(tmp_path, monkeypatch, below):
    out = tmp_path / "out"
    foreign_folder(out)
    (out / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(out / below)
    with pytest.raises(OutputError, match="the working folder"):
        BundleWriter(out, force=True)


def test_the_home_folder_is_not_replaced_even_by_force(tmp_path, monkeypatch):
    foreign_folder(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(OutputError, match="your home folder"):
        BundleWriter(tmp_path / "home", force=True)
    with pytest.raises(OutputError, match="root of a file system"):
        BundleWriter(Path("/"), force=True)


def test_other_evidence(tmp_path):
    out = tmp_path / "out"
    first = write_bundle(out)
    proven = first.with_proof(a_proof(0.25), {"report.html": b"<html>new", "more/trace.json": b"{}"})
    assert open_bundle(out) == proven
    assert proven.digest == first.digest
    assert proven.manifest == first.manifest
    assert proven.proof.variants[0].golden_error == 0.25
    assert (out / "report.html").read_bytes() == b"<html>new"
    assert leftovers(out) == []
    bare = proven.with_proof(a_proof(), {})
    assert open_bundle(out) == bare
    assert not (out / "report.html").exists()


def test_other_evidence_where_there_are_no_hard_links(tmp_path, monkeypatch):
    first = write_bundle(tmp_path / "out")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    proven = first.with_proof(a_proof(0.25), {})
    assert open_bundle(tmp_path / "out") == proven


def test_evidence_that_breaks_a_must_is_not_written(tmp_path):
    out = tmp_path / "out"
    first = write_bundle(out)
    stranger = replace(a_proof().variants[0], variant="stranger")
    with pytest.raises(SchemaError, match="no variant 'stranger'"):
        first.with_proof(replace(a_proof(), variants=(stranger,)), {})
    with pytest.raises(BundleError):
        first.with_proof(a_proof(), {"plan.toml": b"other"})
    assert open_bundle(out) == first
    assert leftovers(out) == []


def test_evidence_for_a_bundle_that_was_replaced_is_not_written(tmp_path):
    out = tmp_path / "out"
    first = write_bundle(out)
    second = write_bundle(out, "two")
    with pytest.raises(IntegrityError, match="replaced by another bundle"):
        first.with_proof(a_proof(), {})
    assert open_bundle(out) == second


def test_what_is_no_bundle_says_what_to_do(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.hasten").write_bytes(b"")
    (tmp_path / "renamed").write_bytes(b"\x28\xb5\x2f\xfd...")
    for name, match in (
        ("absent", "does not exist.*hasten compile"),
        ("folder", "no manifest.json"),
        ("model", "compile it first"),
        ("file", "is no folder"),
        ("a.hasten", "run: hasten unpack"),
        ("renamed", "run: hasten unpack"),
    ):
        with pytest.raises(BundleError, match=match):
            open_bundle(tmp_path / name)
