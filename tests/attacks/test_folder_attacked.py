"""Every MUST of docs/format.md on the folder of a bundle and on proof.json beside its manifest, broken."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bundle_builders import entry_of, reseal, sealed, write_bundle

from artifacts.bundle import open_bundle
from artifacts.errors import IntegrityError, SchemaError


@pytest.fixture
def out(tmp_path):
    write_bundle(tmp_path / "out")
    return tmp_path / "out"


def refuse(out: Path, match: str, *, verify: bool = False) -> None:
    with pytest.raises(IntegrityError, match=match):
        open_bundle(out)
    if not verify:
        with pytest.raises(IntegrityError, match=match):
            open_bundle(out, verify=False)


def listed(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_p2_proof_of_another_bundle(out, tmp_path):
    other = write_bundle(tmp_path / "other", "two")
    (out / "proof.json").write_bytes((other.path / "proof.json").read_bytes())
    refuse(out, r"proof\.json speaks of sha256:")


def test_p2_altered_manifest(out):
    data = (out / "manifest.json").read_bytes()
    (out / "manifest.json").write_bytes(data.replace(b'"tolerance": 0.05', b'"tolerance": 0.95'))
    refuse(out, r"manifest\.json is sha256:")


def test_p3_variants(out):
    payload = json.loads((out / "proof.json").read_bytes())["payload"]
    payload["variants"][0]["variant"] = "stranger"
    (out / "proof.json").write_bytes(sealed(payload))
    with pytest.raises(SchemaError, match="no variant 'stranger'"):
        open_bundle(out)


@pytest.mark.parametrize("path", ["cpu-int8.onnx", "Golden.NPZ", "processor", "manifest.json", "plan.toml/x", "../x"])
def test_p4_evidence_that_clashes(out, path):
    payload = json.loads((out / "proof.json").read_bytes())["payload"]
    payload["files"].append({"path": path, "size": 1, "sha256": "0" * 64})
    (out / "proof.json").write_bytes(sealed(payload))
    with pytest.raises(SchemaError, match=r"proof\.json: payload\.files"):
        open_bundle(out)


def test_t1_missing_or_cut(out):
    for name in listed(out):
        if name == "manifest.json":
            continue
        place = out / name
        data = place.read_bytes()
        place.unlink()
        refuse(out, f"{name} is missing")
        if name != "proof.json":
            for wrong in (data[:-1], data + b"\0", b""):
                place.write_bytes(wrong)
                refuse(out, f"{name} has {len(wrong)} bytes, not {len(data)}")
        place.write_bytes(data)
    open_bundle(out)


def test_t2_one_byte_altered(out):
    for name in listed(out):
        if name in ("manifest.json", "proof.json"):
            continue
        place = out / name
        data = place.read_bytes()
        for position in (0, len(data) // 2, len(data) - 1):
            altered = bytearray(data)
            altered[position] ^= 1
            place.write_bytes(altered)
            refuse(out, f"{name} was altered", verify=True)
        place.write_bytes(data)
    open_bundle(out)


def test_t2_every_bit_of_the_documents_counts(out):
    """Whatever one flipped bit makes of a document, it is refused, or it is outside what is said."""
    sound = open_bundle(out)
    for name in ("manifest.json", "proof.json"):
        data = (out / name).read_bytes()
        for position in range(0, len(data), 13):
            altered = bytearray(data)
            altered[position] ^= 1 << (position % 8)
            (out / name).write_bytes(altered)
            try:
                opened = open_bundle(out, verify=False)
            except (IntegrityError, SchemaError):
                continue
            assert name == "proof.json"
            assert (opened.manifest, opened.proof) == (sound.manifest, sound.proof)
        (out / name).write_bytes(data)


@pytest.mark.parametrize(
    "name", ["evil.py", ".hidden", "weights/more.bin", "processor/.git/config", "manifest.json~", "a\nb", "x\x1b[31m"]
)
def test_t3_something_more(out, name):
    (out / name).parent.mkdir(exist_ok=True, parents=True)
    (out / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match="is not listed") as raised:
        open_bundle(out)
    assert str(raised.value).isprintable()


def test_t3_an_empty_folder(out):
    (out / "weights/folder").mkdir()
    refuse(out, "no listed file is in the folder 'weights/folder'")


def test_t3_a_name_that_is_no_text(out):
    (os.fsencode(out) + b"/\xff").decode("utf-8", "surrogateescape")
    Path(os.fsdecode(os.fsencode(out) + b"/\xff")).write_bytes(b"")
    refuse(out, "is not listed")


def link_to_file(out: Path) -> None:
    (out / "golden.npz").rename(out.parent / "golden.npz")
    (out / "golden.npz").symlink_to(out.parent / "golden.npz")


def link_inside(out: Path) -> None:
    (out / "golden.npz").unlink()
    (out / "golden.npz").symlink_to("plan.toml")


def link_to_folder(out: Path) -> None:
    (out / "processor").rename(out.parent / "processor")
    (out / "processor").symlink_to(out.parent / "processor")


def link_to_itself(out: Path) -> None:
    (out / "weights/loop").symlink_to(".")


def dangling_link(out: Path) -> None:
    (out / "golden.npz").unlink()
    (out / "golden.npz").symlink_to("nowhere")


def linked_manifest(out: Path) -> None:
    (out / "manifest.json").rename(out.parent / "m.json")
    (out / "manifest.json").symlink_to("../m.json")


def pipe(out: Path) -> None:
    (out / "golden.npz").unlink()
    os.mkfifo(out / "golden.npz")


def pipe_as_manifest(out: Path) -> None:
    (out / "manifest.json").unlink()
    os.mkfifo(out / "manifest.json")


def pipe_as_proof(out: Path) -> None:
    (out / "proof.json").unlink()
    os.mkfifo(out / "proof.json")


def folder_as_manifest(out: Path) -> None:
    (out / "manifest.json").unlink()
    (out / "manifest.json").mkdir()


def unix_socket(out: Path) -> None:
    (out / "golden.npz").unlink()
    before = Path.cwd()
    os.chdir(out)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("golden.npz")
    finally:
        os.chdir(before)


def device(out: Path) -> None:
    (out / "golden.npz").unlink()
    try:
        os.mknod(out / "golden.npz", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize(
    "attack",
    [
        link_to_file,
        link_inside,
        link_to_folder,
        link_to_itself,
        dangling_link,
        linked_manifest,
        pipe,
        pipe_as_manifest,
        pipe_as_proof,
        folder_as_manifest,
        unix_socket,
        device,
    ],
)
def test_t4_links_and_special_files(out, attack):
    attack(out)
    refuse(out, "a bundle has plain files")


def test_t5_nothing_is_executed(out):
    """Executable things of every kind, listed and sound: opening must not touch an interpreter, loader or process."""
    document = json.loads((out / "manifest.json").read_bytes())
    evil = "import os; os.system('touch pwned')\n"
    for name in ("sitecustomize.py", "artifacts.py", "processor/evil.py", "golden.pkl"):
        (out / name).write_text(evil)
        document["files"].append(entry_of(out, name))
    (out / "manifest.json").write_text(json.dumps(document))
    reseal(out)
    program = textwrap.dedent(
        """
        import sys, json
        from artifacts.bundle import open_bundle
        open_bundle(sys.argv[2])  # everything that is ours is imported now
        seen = []
        bad = ("exec", "compile", "import", "marshal", "pickle", "subprocess", "os.system", "os.exec", "os.fork",
               "os.posix_spawn", "ctypes", "socket")
        sys.addaudithook(lambda event, args: seen.append(event) if event.startswith(bad) else None)
        open_bundle(sys.argv[1])
        print(json.dumps(seen))
        """
    )
    write_bundle(out.parent / "sound")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(out), str(out.parent / "sound")],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert not list(out.parent.rglob("pwned"))


def test_j3_a_huge_document_is_not_read(out):
    for name in ("manifest.json", "proof.json"):
        data = (out / name).read_bytes()
        with (out / name).open("r+b") as file:
            file.truncate(1 << 40)  # sparse: takes no room
        refuse(out, f"{name} has more than 16777216 bytes")
        (out / name).write_bytes(data)


def test_errors_name_the_bundle(out):
    (out / "golden.npz").unlink()
    refuse(out, f"^{out}: golden.npz is missing")
