"""Bundles whose weights are hashed while something else is done: nothing altered gets by, whatever the body did."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from bundle_builders import write_bundle

from artifacts import beside
from artifacts.beside import opened_beside
from artifacts.bundle import check_hash, open_bundle
from artifacts.errors import BundleError, IntegrityError, ProviderError


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def weights_of(root: Path) -> list[Path]:
    return sorted((root / "weights").iterdir())


def test_the_bundle_is_the_one_that_open_bundle_opens(tmp_path):
    write_bundle(tmp_path / "b")
    with opened_beside(tmp_path / "b") as bundle:
        assert bundle == open_bundle(tmp_path / "b")


@pytest.mark.parametrize("which", [0, 1])
def test_an_altered_weight_is_told_in_the_words_of_open_bundle(tmp_path, which):
    write_bundle(tmp_path / "b")
    alter(weights_of(tmp_path / "b")[which])
    with pytest.raises(IntegrityError) as wanted:
        open_bundle(tmp_path / "b")
    reached = False
    with pytest.raises(IntegrityError) as found, opened_beside(tmp_path / "b"):
        reached = True
    assert reached
    assert str(found.value) == str(wanted.value)


def test_an_altered_weight_is_the_error_where_the_body_failed_too(tmp_path):
    write_bundle(tmp_path / "b")
    alter(weights_of(tmp_path / "b")[0])
    failure = ProviderError("computes wrong results")
    with pytest.raises(IntegrityError, match="altered") as found, opened_beside(tmp_path / "b"):
        raise failure
    assert found.value.__cause__ is failure


def test_of_a_sound_bundle_the_error_of_the_body_stays(tmp_path):
    write_bundle(tmp_path / "b")
    with pytest.raises(ProviderError, match="wrong results"), opened_beside(tmp_path / "b"):
        raise ProviderError("computes wrong results")


@pytest.mark.parametrize("name", ["cpu-int8.onnx", "golden.npz", "processor/tokenizer.json", "report.html"])
def test_what_is_no_weight_is_hashed_before_the_body(tmp_path, name):
    write_bundle(tmp_path / "b")
    alter(tmp_path / "b" / name)
    with pytest.raises(IntegrityError, match=name), opened_beside(tmp_path / "b"):
        pytest.fail("the body ran")


def test_a_missing_weight_is_found_before_the_body(tmp_path):
    write_bundle(tmp_path / "b")
    weights_of(tmp_path / "b")[0].unlink()
    with pytest.raises(IntegrityError, match="missing"), opened_beside(tmp_path / "b"):
        pytest.fail("the body ran")


@pytest.fixture
def gate(monkeypatch):
    """An event that hashing waits for."""
    opened = threading.Event()

    def wait(path, entry):
        assert opened.wait(10)
        check_hash(path, entry)

    monkeypatch.setattr(beside, "check_hash", wait)
    return opened


def opened(path, body):
    with opened_beside(path):
        body()


def test_leaving_waits_for_the_hashes(tmp_path, gate):
    write_bundle(tmp_path / "b")
    alter(weights_of(tmp_path / "b")[1])
    timer = threading.Timer(0.2, gate.set)
    with pytest.raises(IntegrityError, match="altered"):
        opened(tmp_path / "b", timer.start)
    assert gate.is_set()


def test_a_bundle_that_was_replaced_meanwhile_is_called_so(tmp_path, gate):
    def body():
        write_bundle(tmp_path / "b", "two", force=True)
        gate.set()

    write_bundle(tmp_path / "b", "one")
    with pytest.raises(IntegrityError, match="replaced by another bundle"):
        opened(tmp_path / "b", body)


def test_a_bundle_that_is_gone_meanwhile_is_one_line(tmp_path, gate):
    def body():
        shutil.rmtree(tmp_path / "b")
        gate.set()

    write_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="does not exist"):
        opened(tmp_path / "b", body)


def test_an_interruption_hashes_no_more_than_was_begun(tmp_path, monkeypatch, gate):
    def body():
        threading.Timer(0.2, gate.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    begun = []
    waiting = beside.check_hash
    monkeypatch.setattr(beside, "check_hash", lambda path, entry: (begun.append(entry), waiting(path, entry)))
    write_bundle(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "b", body)
    assert len(begun) <= 1
