"""manifest.json and proof.json: round trips, canonical bytes, what is made fit for them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from bundle_builders import CPU, EMPTY_DIGEST, a_decoder_manifest, a_manifest, a_proof
from hypothesis import given
from hypothesis import strategies as st

from artifacts.constraints import path_problem, printable, shown
from artifacts.digest import canonical_json, sha256_bytes, sha256_file
from artifacts.manifest import FileEntry, Manifest, TensorSpec
from artifacts.proof import Proof, Speed, VariantProof


def complete() -> Manifest:
    weights = tuple(f"weights/{digit * 64}.bin" for digit in "ab")
    files = [FileEntry(path, 9, path[8:72]) for path in weights]
    names = ("cpu-fp32.onnx", "cpu-int8.onnx", "processor/tokenizer.json")
    files += [FileEntry(name, 5, "c" * 64) for name in names]
    return replace(a_manifest(weights), files=tuple(sorted(files, key=lambda entry: entry.path)))


def test_manifest_round_trip():
    manifest = complete()
    assert Manifest.parse(manifest.to_json()) == manifest


def test_manifest_of_plain_tensors_needs_no_processor():
    manifest = replace(complete(), task="tensors", processor=None)
    assert Manifest.parse(manifest.to_json()) == manifest


def test_manifest_of_a_language_model_round_trips():
    manifest = a_decoder_manifest()
    assert Manifest.parse(manifest.to_json()) == manifest
    generation = manifest.generation
    assert generation is not None
    bare = replace(manifest, generation=replace(generation, eos=(), bos=-1, chat_template="", special=()))
    assert Manifest.parse(bare.to_json()) == bare


def test_what_generates_no_text_says_nothing_of_generation():
    assert b"generation" not in complete().to_json()


def test_scalar_and_empty_shapes_round_trip():
    manifest = replace(complete(), outputs=(TensorSpec("y", "float32", ()), TensorSpec("z", "bool", (0, "n"))))
    assert Manifest.parse(manifest.to_json()) == manifest


def test_manifest_bytes_are_canonical():
    data = complete().to_json()
    document = json.loads(data)
    assert document["schema"] == 1
    assert data == json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"
    assert data == complete().to_json()


def test_toolchain_is_sorted_when_read():
    manifest = replace(complete(), toolchain=(("z", "1"), ("a", "2")))
    assert Manifest.parse(manifest.to_json()).toolchain == (("a", "2"), ("z", "1"))


def test_numbers_of_numpy_are_written():
    speed = Speed(np.int64(1), np.int32(2), np.float32(0.5), np.float64(2.0), np.float32(4), 1, np.float16(1.5))
    proof = replace(a_proof(), variants=(replace(a_proof().variants[0], speed=(speed,)),))
    assert Proof.parse(proof.to_json()).variants[0].speed == (Speed(1, 2, 0.5, 2.0, 4.0, 1.0, 1.5),)


def test_proof_round_trip():
    proof = replace(a_proof(), files=(FileEntry("report.html", 3, "d" * 64),))
    assert Proof.parse(proof.to_json()) == proof
    document = json.loads(proof.to_json())
    assert sorted(document) == ["payload", "schema", "sha256"]
    assert document["sha256"] == sha256_bytes(canonical_json(document["payload"]))


def test_a_variant_is_found_by_id():
    proof = a_proof()
    assert proof.variant("cpu-int8") is proof.variants[0]
    assert proof.variant("other") is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_errors_that_are_not_finite_survive_as_infinity(value):
    proof = Proof.parse(a_proof(value).to_json())
    assert proof.variants[0].golden_error == math.inf


def test_a_number_of_the_manifest_that_is_not_finite_is_not_written():
    manifest = complete()
    broken = replace(manifest, variants=(replace(manifest.variants[0], tolerance=math.nan),))
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json()


@given(st.text())
def test_reasons_become_printable_lines(text):
    proof = VariantProof("v", "refused", CPU, None, 0.0, (), (), (), 0, text)
    parsed = Proof.parse(Proof(EMPTY_DIGEST, (proof,), ()).to_json())
    assert parsed.variants[0].reason == proof.reason == printable(proof.reason)


def test_terminal_sequences_go_from_reasons():
    assert printable("\x1b[31merror:\x1b[0m it\nbroke\x07") == "error: it broke"


def test_shown_is_short_and_plain():
    assert shown("\x1b[1m") == r"'\x1b[1m'"
    assert len(shown("x" * 1000)) == 80
    assert shown([[[]]]) == "an array"


@given(st.from_regex(r"[a-z0-9_]{1,20}(/[a-z0-9_]{1,20}){0,3}\.[a-z]{1,4}", fullmatch=True))
def test_usual_paths_are_allowed(path):
    # The generator does make con.x now and then.
    assert path_problem(path) in ("", f"{path!r} is no portable path")


def test_hashes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == sha256_bytes(memoryview(data))
