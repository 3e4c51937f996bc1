"""Whatever the bytes: a bundle is opened, or refused with a BundleError; never another exception."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from bundle_builders import compressed, members_of, names, reseal, sealed, tar_of, write_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts.bundle import open_bundle
from artifacts.errors import BundleError
from artifacts.manifest import Manifest
from artifacts.pack import unpack
from artifacts.proof import Proof

FAST = settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SLOW = settings(FAST, max_examples=80)

T = TypeVar("T")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["..", "/", "cpu-int8.onnx", "", "sha256:", "CPUExecutionProvider", "\ud800", "a" * 70_000])
    | st.sampled_from([2**53, 2**64, -1, 1e308, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("fuzz") / "out")


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, item in items for inner in places(item, (*place, key)))]


def mutate(data: st.DataObject, document: Any) -> Any:
    """The document with one to three things replaced, deleted, copied elsewhere or added."""
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(document)[1:] or [()]))
        if not place:
            return document
        holder = document
        for step in place[:-1]:
            holder = holder[step]
        action = data.draw(st.sampled_from(["replace", "delete", "copy", "add", "double"]))
        if action == "replace":
            holder[place[-1]] = data.draw(json_values)
        elif action == "delete":
            del holder[place[-1]]
        elif action == "copy":
            source: Any = document
            for step in data.draw(st.sampled_from(places(document)[1:])):
                source = source[step]
            holder[place[-1]] = copy.deepcopy(source)
        elif isinstance(holder, list):
            holder.append(data.draw(json_values) if action == "add" else copy.deepcopy(holder[place[-1]]))
        else:
            holder[data.draw(st.text(max_size=8))] = data.draw(json_values)
    return document


def attempt(action: Callable[[], T]) -> T | None:
    """What an action gives; None if it refuses with a BundleError of one printable line."""
    try:
        return action()
    except BundleError as error:
        text = str(error)
    assert text.isprintable()
    return None


def manifest_or_refused(data: bytes) -> Manifest | None:
    manifest = attempt(lambda: Manifest.parse(data))
    assert manifest is None or Manifest.parse(manifest.to_json()) == manifest
    return manifest


def proof_or_refused(data: bytes) -> Proof | None:
    proof = attempt(lambda: Proof.parse(data))
    assert proof is None or Proof.parse(proof.to_json()) == proof
    return proof


@FAST
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(data):
    assert manifest_or_refused(data) is None
    assert proof_or_refused(data) is None


@FAST
@given(json_values)
def test_any_json(value):
    data = json.dumps(value).encode()
    assert manifest_or_refused(data) is None
    assert proof_or_refused(data) is None
    assert manifest_or_refused(json.dumps({"schema": 1, "files": value}).encode()) is None
    proof_or_refused(sealed_anyway(value))


def sealed_anyway(payload: Any) -> bytes:
    try:
        return sealed(payload)
    except ValueError:  # NaN has no canonical form
        return json.dumps({"schema": 1, "sha256": "0" * 64, "payload": payload}).encode()


def altered(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    out = bytearray(data)
    for start, length, replacement in edits:
        position = start % len(out) if out else 0
        out[position : position + length] = replacement
    return bytes(out)


edit = st.tuples(st.integers(0, 1 << 20), st.integers(0, 40), st.binary(max_size=6))


@FAST
@given(st.lists(edit, min_size=1, max_size=4))
def test_altered_bytes(sound, edits):
    manifest_or_refused(altered((sound.path / "manifest.json").read_bytes(), edits))
    proof_or_refused(altered((sound.path / "proof.json").read_bytes(), edits))


@FAST
@given(st.data())
def test_altered_manifest(sound, data):
    document = mutate(data, json.loads((sound.path / "manifest.json").read_bytes()))
    manifest_or_refused(json.dumps(document).encode())


@FAST
@given(st.data())
def test_altered_proof(sound, data):
    payload = mutate(data, json.loads((sound.path / "proof.json").read_bytes())["payload"])
    proof_or_refused(sealed_anyway(payload))


@SLOW
@given(st.data())
def test_altered_folder(sound, data):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name, content in members_of(sound):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
        document = mutate(data, json.loads((out / "manifest.json").read_bytes()))
        (out / "manifest.json").write_text(json.dumps(document))
        if data.draw(st.booleans()):
            reseal(out)
        attempt(lambda: open_bundle(out))


@SLOW
@given(st.data(), st.booleans())
def test_altered_pack(sound, data, inside):
    members = members_of(sound)
    if inside:
        name, content = members[0]
        members[0] = (name, json.dumps(mutate(data, json.loads(content))).encode())
        payload = json.loads(members[1][1])["payload"]
        members[1] = ("proof.json", sealed_anyway(mutate(data, payload) if data.draw(st.booleans()) else payload))
    packed = tar_of(members)
    if not inside:
        packed = altered(packed, data.draw(st.lists(edit, min_size=1, max_size=3)))
    packed = compressed(packed)
    if data.draw(st.booleans()):
        packed = altered(packed, data.draw(st.lists(edit, min_size=1, max_size=2)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.hasten").write_bytes(packed)
        if attempt(lambda: unpack(Path(folder) / "a.hasten", Path(folder) / "out")) is None:
            assert names(Path(folder)) == ["a.hasten"]
