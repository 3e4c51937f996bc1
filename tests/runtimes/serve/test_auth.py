"""API keys: made once, hashed at rest, compared in full."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from artifacts.errors import OutputError, UsageError
from runtimes.serve.auth import PREFIX, Keys, new_key


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key(file, "alice")
    assert key.startswith(PREFIX)
    assert len(key) == len(PREFIX) + 43  # 256 bits in base64
    assert key not in file.read_text()
    assert file.read_text() == f"alice sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Keys.read(file).who(key) == "alice"


def test_several_keys_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who may ask")  # no newline at its end
    first, second = new_key(file, "alice"), new_key(file, "bob@example.com")
    keys = Keys.read(file)
    assert [keys.who(key) for key in (first, second)] == ["alice", "bob@example.com"]
    assert file.read_text().startswith("# who may ask\nalice sha256:")


@pytest.mark.parametrize("wrong", ["", "x", PREFIX, "\udcff", "ключ", "0" * 100_000])
def test_what_is_no_key(tmp_path: Path, wrong: str) -> None:
    new_key(tmp_path / "keys", "alice")
    assert Keys.read(tmp_path / "keys").who(wrong) is None


def test_a_name_twice(tmp_path: Path) -> None:
    new_key(tmp_path / "keys", "alice")
    with pytest.raises(UsageError, match="has a key named alice"):
        new_key(tmp_path / "keys", "alice")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a\nb", "é", "a" * 65])
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a key"):
        new_key(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "holds no key"),
        (b"# nobody\n", "holds no key"),
        (b"alice\n", "line 1 of .* is no name and hash"),
        (b"\nalice sha256:00\n", "line 2 of"),
        (b"alice md5:" + b"0" * 64, "line 1 of"),
        (b"alice sha256:" + b"0" * 64 + b" more", "line 1 of"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_of_no_keys(tmp_path: Path, text: bytes, told: str) -> None:
    (tmp_path / "keys").write_bytes(text)
    with pytest.raises(UsageError, match=told):
        Keys.read(tmp_path / "keys")


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Keys.read(tmp_path / "none")
    with pytest.raises(OutputError, match="cannot be written"):
        new_key(tmp_path / "none" / "keys", "alice")
