"""How files get into the user's cache: whole or not at all, and never as an error."""

from __future__ import annotations

from pathlib import Path

from runtimes.remember import keep


def test_a_file_is_kept_in_folders_that_it_makes(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "file.npz"
    keep(path, lambda temporary: temporary.write_bytes(b"first"))
    assert path.read_bytes() == b"first"
    keep(path, lambda temporary: temporary.write_bytes(b"second"))
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_is_kept_too(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "cache" / "file"
    source.write_bytes(b"content")
    for _ in range(2):
        keep(path, lambda temporary: temporary.hardlink_to(source))
        assert path.samefile(source)
        assert list(path.parent.iterdir()) == [path]


def test_what_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"ha")
        raise OSError("the disk is full")

    keep(path, half)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    keep(tmp_path / "file" / "name", lambda temporary: temporary.write_bytes(b"content"))
    assert (tmp_path / "file").read_text() == "in the way"
