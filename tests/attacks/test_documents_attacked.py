"""Every MUST of docs/format.md on manifest.json and proof.json, broken."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from bundle_builders import a_decoder_manifest, a_manifest, a_proof, sealed

from artifacts.errors import IntegrityError, SchemaError
from artifacts.manifest import FileEntry, Manifest
from artifacts.proof import Proof

Document = dict[str, Any]


def a_document() -> Document:
    weights = tuple(f"weights/{digit * 64}.bin" for digit in "ab")
    files = [FileEntry(path, 9, path[8:72]) for path in weights]
    files += [FileEntry(name, 5, "c" * 64) for name in ("cpu-fp32.onnx", "cpu-int8.onnx", "processor/tokenizer.json")]
    return json.loads(replace(a_manifest(weights), files=tuple(files)).to_json())


def a_decoder_document() -> Document:
    return json.loads(a_decoder_manifest().to_json())


def a_payload() -> Document:
    return json.loads(a_proof().to_json())["payload"]


def refuse(document: object, match: str) -> None:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(SchemaError, match=match):
        Manifest.parse(data)


def refuse_proof(payload: Document, match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        Proof.parse(sealed(payload))


def test_the_documents_that_are_altered_here_are_sound():
    Manifest.parse(json.dumps(a_document()).encode())
    Manifest.parse(json.dumps(a_decoder_document()).encode())
    Proof.parse(sealed(a_payload()))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        (b"[]", "no object"),
        (b"1", "no object"),
        (b"null", "no object"),
        (b'{"schema": NaN}', "NaN is no number"),
        (b'{"schema": -Infinity}', "-Infinity is no number"),
        (b"{} {}", "no JSON"),
        (b'{"a": "\n"}', "no JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_j1_no_json(data, match):
    refuse(data, f"manifest.json: .*{match}")
    with pytest.raises(SchemaError, match=rf"proof\.json: .*{match}"):
        Proof.parse(data)


def test_j1_numbers_out_of_range():
    data = json.dumps(a_document()).encode()
    assert b'"tolerance": 0.05' in data
    refuse(data.replace(b'"tolerance": 0.05', b'"tolerance": 1e999'), r"variants\[1\].tolerance: .*out of range")


def test_j2_key_twice():
    data = json.dumps(a_document()).encode()
    refuse(data.replace(b'{"files"', b'{"name": "other", "files"'), "'name' stands twice")
    refuse(data.replace(b'"kind":', b'"kind": "onnx", "kind":'), "'kind' stands twice")
    proof = a_proof().to_json().replace(b'"schema"', b'"sha256": "", "schema"')
    with pytest.raises(SchemaError, match="'sha256' stands twice"):
        Proof.parse(proof)


def test_j3_bounds():
    document = a_document()
    document["variants"][0]["pipeline"] = "x" * 65_537
    refuse(document, r"variants\[0\].pipeline: a string of 65537 characters")
    document = a_document()
    document["processor"]["labels"] = ["x"] * 200_001
    refuse(document, "processor.labels: 200001 items")
    document = a_document()
    document["processor"]["pad_id"] = 2**53 + 1
    refuse(document, "processor.pad_id: .*out of range")
    refuse(b" " * (16 << 20) + json.dumps(a_document()).encode(), "16777216 are allowed")
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        refuse(opening * 100_000 + b"1" + closing * 100_000, "nested too deeply")
    for depth in (100, 300, 500, 900):
        refuse(b'{"schema": 1, "name": ' + b"[" * depth + b"]" * depth + b"}", "manifest.json")


def test_j4_schema():
    for schema in (2, 10**4000):
        refuse({"schema": schema, "what": "the future holds"}, "made by a newer hasten.*upgrade hasten")
    for schema in (0, -1):
        refuse(a_document() | {"schema": schema}, "there is no schema")
    for schema in ("1", 1.0, True, None, [1]):
        refuse(a_document() | {"schema": schema}, "schema: missing or no integer")
    refuse({}, "schema: missing")
    with pytest.raises(SchemaError, match="upgrade hasten"):
        Proof.parse(json.dumps({"schema": 2}).encode())


def objects(value: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all objects in a document."""
    if isinstance(value, dict):
        found = [place]
        return found + [inner for key, item in value.items() for inner in objects(item, (*place, key))]
    if isinstance(value, list):
        return [inner for index, item in enumerate(value) for inner in objects(item, (*place, index))]
    return []


def at(document: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        document = document[step]
    return document


def test_j5_keys():
    for place in objects(a_document()):
        if place == ("toolchain",):
            continue
        document = a_document()
        at(document, place)["surprise"] = 1
        refuse(document, "unknown key 'surprise'")
        for key in at(a_document(), place):
            document = a_document()
            del at(document, place)[key]
            refuse(document, "missing")
    for place in objects(a_payload()):
        payload = a_payload()
        at(payload, place)["surprise"] = 1
        refuse_proof(payload, "unknown key 'surprise'")
        for key in at(a_payload(), place):
            payload = a_payload()
            del at(payload, place)[key]
            refuse_proof(payload, f"'{key}' is missing")
    for broken in ({"schema": 1}, {"schema": 1, "sha256": "0" * 64}, {"schema": 1, "sha256": "0" * 64, "payload": []}):
        with pytest.raises(SchemaError, match=r"proof\.json"):
            Proof.parse(json.dumps(broken).encode())


def leaves(value: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of everything in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, item in items for inner in leaves(item, (*place, key)))]


def kind_of(value: object) -> str:
    return {int: "number", float: "number"}.get(type(value), type(value).__name__)


def test_j6_types():
    wrong: list[Any] = ["text", 7, True, [], {}, None]
    for place in leaves(a_document()):
        if place in ((), ("schema",)) or place[-2:-1] == ("shape",):
            continue
        for value in wrong:
            if kind_of(value) == kind_of(at(a_document(), place)) or (place == ("processor",) and value is None):
                continue
            document = a_document()
            at(document, place[:-1])[place[-1]] = value
            refuse(document, "manifest.json: ")
    for place, value in ((("files", 0, "size"), 9.0), (("processor", "pad_id"), 1e3), (("processor", "pairs"), 1)):
        document = a_document()
        at(document, place[:-1])[place[-1]] = value
        refuse(document, "expected")
    document = a_document()
    document["inputs"][0]["shape"] = ["batch", None]
    refuse(document, r"inputs\[0\].shape\[1\]: None has the wrong type")


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\ud800"])
def test_j7_control_characters(character):
    for place in (("name",), ("source", "name"), ("processor", "labels", 0), ("variants", 0, "pipeline")):
        document = a_document()
        at(document, place[:-1])[place[-1]] = f"a{character}b"
        refuse(document, "control character")
    document = a_document()
    document["toolchain"][f"a{character}"] = "1"
    refuse(document, "control character")
    document = a_document()
    document[f"a{character}"] = "1"
    with pytest.raises(SchemaError) as raised:
        Manifest.parse(json.dumps(document).encode())
    assert character not in str(raised.value)
    payload = a_payload()
    payload["variants"][0]["reason"] = f"a{character}b"
    refuse_proof(payload, "control character")


PATHS = [
    ("/etc/passwd", "absolute"),
    ("\\\\server\\share", "absolute"),
    ("C:/Windows", "absolute"),
    ("c:x", "absolute"),
    ("../escape", "part '..'"),
    ("processor/../../escape", "part '..'"),
    ("processor/..", "part '..'"),
    ("./x", "part '.'"),
    ("", "part ''"),
    ("a//b", "part ''"),
    ("a/", "part ''"),
    ("..\\x", "no portable path"),
    ("a\\b", "no portable path"),
    (".hidden", "no portable path"),
    ("-rf", "no portable path"),
    ("a.", "no portable path"),
    ("a ", "no portable path"),
    ("ab:stream", "no portable path"),
    ("naïve", "no portable path"),
    ("\u0430", "no portable path"),  # Cyrillic
    ("CON", "no portable path"),
    ("x/nul.txt", "no portable path"),
    ("~", "no portable path"),
    ("a" * 101, "no portable path"),
    ("/".join(["a" * 50] * 3), "150 are allowed"),
]


@pytest.mark.parametrize(("path", "match"), PATHS)
def test_m1_paths(path, match):
    document = a_document()
    document["files"].append({"path": path, "size": 1, "sha256": "0" * 64})
    refuse(document, rf"files\[5\].path: .*{match}")
    document = a_document()
    document["processor"]["tokenizer"] = path
    refuse(document, rf"processor.tokenizer: .*{match}")
    document = a_document()
    document["variants"][0]["weights"][0] = path
    refuse(document, r"variants\[0\].weights\[0\]: ")
    document = a_document()
    document["variants"][0]["model"] = path
    refuse(document, r"variants\[0\].model: ")
    payload = a_payload()
    payload["files"].append({"path": path, "size": 1, "sha256": "0" * 64})
    refuse_proof(payload, match)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("cpu-int8.onnx", "stands twice"),
        ("CPU-int8.onnx", "stands twice"),
        ("processor", "is a file and the folder of"),
        ("PROCESSOR", "is a file and the folder of"),
        ("cpu-int8.onnx/inside", "is a file and the folder of"),
        ("manifest.json", "another document"),
        ("Proof.JSON", "another document"),
        ("proof.json/inside", "another document"),
    ],
)
def test_m2_paths_that_clash(path, match):
    document = a_document()
    document["files"].append({"path": path, "size": 1, "sha256": "0" * 64})
    refuse(document, f"files.*{match}")


def test_m3_sizes_and_hashes():
    for size in (-1, 2**44 + 1, 2**53 + 1, 10**30):
        document = a_document()
        document["files"][0]["size"] = size
        refuse(document, r"files\[0\].size")
    for digest in ("", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "٠" * 64, "0" * 64 + "\n"):
        document = a_document()
        document["files"][4]["sha256"] = digest
        refuse(document, r"files\[4\].sha256")
    document = a_document()
    document["files"] += [{"path": f"x{index}", "size": 2**44, "sha256": "0" * 64} for index in range(513)]
    refuse(document, "add up to too much")


def test_m4_variants():
    for identity in ("", "CPU", "a/b", "..", ".a", "-a", "a" * 65, "ü", "a b"):
        document = a_document()
        document["variants"][0] |= {"id": identity, "model": f"{identity}.onnx"}
        refuse(document, r"variants\[0\].id")
    document = a_document()
    document["variants"][0] |= {"id": "con", "model": "con.onnx"}
    refuse(document, "no portable path")
    document = a_document()
    document["variants"][0]["model"] = "cpu-int8.onnx"
    refuse(document, r"variants\[0\].model: .*is not 'cpu-fp32.onnx'")
    document = a_document()
    document["variants"][0] |= {"id": "other", "model": "other.onnx"}
    refuse(document, "'other.onnx' is not listed in files")
    document = a_document()
    document["variants"].append(document["variants"][0])
    refuse(document, r"variants\[2\]: the id 'cpu-fp32' stands twice")
    document = a_document()
    document["variants"] = document["variants"] * 150
    refuse(document, "300 variants; 256 are allowed")


def test_m5_weights():
    a, unlisted = f"weights/{'a' * 64}.bin", f"weights/{'f' * 64}.bin"
    for weights, match in (
        ([a, unlisted], "not listed in files"),
        ([a, a], "stands twice"),
        (["processor/tokenizer.json"], "is no weights/<sha256>.bin"),
        (["weights/x.bin"], "is no weights/<sha256>.bin"),
    ):
        document = a_document()
        document["variants"][0]["weights"] = weights
        refuse(document, rf"variants\[0\].weights.*{match}")
    document = a_document()
    document["files"][0]["sha256"] = "d" * 64
    refuse(document, "not named by its hash")
    document = a_document()
    document["files"].append({"path": "weights/x.py", "size": 1, "sha256": "0" * 64})
    refuse(document, "not named by its hash")
    document = a_document()
    document["files"].append({"path": unlisted, "size": 1, "sha256": "f" * 64})
    refuse(document, "no variant refers to")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("task",), "image-generation"),
        (("name",), ""),
        (("name",), "x" * 257),
        (("source", "kind"), "pickle"),
        (("source", "digest"), "md5:00"),
        (("inputs", 0, "dtype"), "object"),
        (("inputs", 0, "shape", 0), -1),
        (("inputs", 0, "shape", 0), 2**40),
        (("inputs", 0, "shape", 0), ""),
        (("processor", "problem"), "other"),
        (("processor", "max_length"), 0),
        (("processor", "max_length"), 2**25),
        (("processor", "pad_id"), -1),
        (("variants", 0, "target"), "CPU!"),
        (("variants", 0, "providers", 0), "CPU"),
        (("variants", 0, "providers", 0), "../evil.soExecutionProvider"),
        (("variants", 0, "precision"), ""),
        (("variants", 0, "tolerance"), -0.1),
        (("variants", 0, "tolerance"), 1.1),
        (("variants", 0, "session", "optimization_level"), "99"),
        (("variants", 0, "session", "disabled_optimizers", 0), "a;b"),
        (("variants", 0, "session", "disabled_optimizers", 0), ""),
        (("variants", 0, "session", "precision"), "int1"),
    ],
)
def test_m6_vocabularies(place, value):
    document = a_document()
    at(document, place[:-1])[place[-1]] = value
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")
    with pytest.raises(SchemaError) as raised:
        Manifest.parse(json.dumps(document).encode())
    assert f"manifest.json: {key}: " in str(raised.value)


def test_m7_at_least_one():
    for name in ("variants", "inputs", "outputs"):
        refuse(a_document() | {name: []}, f"{name}: at least one is needed")
    for name in ("inputs", "outputs"):
        document = a_document()
        document[name] = document[name] * 2
        refuse(document, rf"{name}\[1\]: the name .* stands twice")
    document = a_document()
    document["variants"][0]["providers"] = []
    refuse(document, r"variants\[0\].providers: at least one")
    document["variants"][0]["providers"] = ["CPUExecutionProvider"] * 2
    refuse(document, r"variants\[0\].providers: a provider stands twice")


def test_m8_processor():
    refuse(a_document() | {"processor": None}, "processor: the task text-classification needs one")
    document = a_document()
    document["processor"]["tokenizer"] = "processor/other.json"
    refuse(document, "processor.tokenizer: 'processor/other.json' is not listed")


def test_m9_generation():
    document = a_decoder_document()
    del document["generation"]
    refuse(document, "generation: the task text-generation needs one")
    refuse(a_decoder_document() | {"generation": None}, "generation: the key is left out")
    refuse(a_document() | {"generation": None}, "generation: the key is left out")
    refuse(a_document() | {"generation": a_decoder_document()["generation"]}, "text-classification has none")
    refuse(a_decoder_document() | {"processor": None}, "processor: the task text-generation needs one")
    for key in a_decoder_document()["generation"]:
        document = a_decoder_document()
        del document["generation"][key]
        refuse(document, f"generation: the key '{key}' is missing")
    document = a_decoder_document()
    document["generation"]["surprise"] = 1
    refuse(document, "unknown key 'surprise'")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("eos", [-1], r"eos\[0\]: -1 is not in"),
        ("eos", [97], "eos: 97 is outside a vocabulary of 97"),
        ("eos", 2, "eos: an array was expected"),
        ("bos", -2, "bos: -2 is not in"),
        ("bos", 97, "bos: 97 is outside a vocabulary of 97"),
        ("bos", None, "bos: an integer was expected"),
        ("chat_template", "processor/other.jinja", "chat_template: .* is not listed"),
        ("chat_template", "../template.jinja", "chat_template: .*part '..'"),
        ("chat_template", None, "chat_template: a string was expected"),
        ("special", {"Eos Token": "</s>"}, "special: 'Eos Token' does not match"),
        ("special", {"eos_token": 2}, "a string was expected"),
        ("special", {"eos_token": "a\nb"}, "control character"),
        ("special", [], "special: an object was expected"),
        ("temperature", -0.1, "temperature: -0.1 is not in"),
        ("temperature", 101, "temperature: 101"),
        ("temperature", True, "temperature: a number was expected"),
        ("top_k", -1, "top_k: -1 is not in"),
        ("top_p", 1.5, "top_p: 1.5 is not in"),
        ("min_p", -0.5, "min_p: -0.5 is not in"),
        ("repetition_penalty", 0, "repetition_penalty: 0"),
        ("sample", 1, "sample: true or false"),
    ],
)
def test_m9_values(key, value, match):
    document = a_decoder_document()
    document["generation"][key] = value
    refuse(document, f"generation.*{match}")


def swapped(items: list[Any], first: int, second: int) -> list[Any]:
    changed = list(items)
    changed[first], changed[second] = changed[second], changed[first]
    return changed


def test_m10_inputs_of_a_decoder():
    whole = a_decoder_document()["inputs"]
    for inputs, match in (
        (swapped(whole, 0, 1), "'position_ids' stands where input_ids"),
        (whole[1:], "'position_ids' stands where input_ids"),
        (whole[:4], "pair of key and value"),
        (whole[:5], "pair of key and value"),
        (whole[:-1], "pair of key and value"),
        (swapped(whole, 5, 6), "'past_key_values.0.value' stands where past_key_values.0.key"),
        (swapped(whole, 5, 7), "stands where past_key_values.0.key"),
    ):
        refuse(a_decoder_document() | {"inputs": inputs}, f"inputs: .*{match}")
    for index, key, value, match in (
        (0, "dtype", "int32", "stands where input_ids, int64"),
        (2, "dtype", "int64", "stands where seqlens_k, int32"),
        (3, "shape", [1], "stands where total_sequence_length"),
        (4, "shape", ["batch", 1], "stands where logits_index"),
        (5, "dtype", "float64", "past_key_values.0.key is float64"),
        (5, "shape", ["batch", 2, 64, 8], "is not .batch, heads, capacity, head size"),
        (5, "shape", ["batch", "heads", "capacity", 8], "heads of past_key_values.0.key and their size are numbers"),
        (5, "shape", ["batch", 2, "capacity", 0], "are numbers"),
        (5, "shape", ["batch", 2, "capacity"], "is not .batch"),
    ):
        document = a_decoder_document()
        document["inputs"][index][key] = value
        refuse(document, f"inputs: .*{match}")


def test_m10_outputs_of_a_decoder():
    whole = a_decoder_document()["outputs"]
    for outputs, match in (
        (whole[1:], "the first is logits"),
        (whole[:-1], "5 belong here, not 4"),
        ([*whole, dict(whole[0], name="more")], "5 belong here, not 6"),
        (swapped(whole, 1, 2), "'present.0.value' stands where present.0.key"),
    ):
        refuse(a_decoder_document() | {"outputs": outputs}, f"outputs: .*{match}")
    for index, key, value, match in (
        (0, "dtype", "float16", "the first is logits"),
        (0, "shape", ["batch", "sequence", 97], "the first is logits"),
        (0, "shape", ["batch", "positions"], "size of the vocabulary"),
        (0, "shape", ["batch", "positions", "vocabulary"], "size of the vocabulary"),
        (1, "dtype", "float16", "the same tensor as past_key_values.0.key"),
        (1, "shape", ["batch", 2, "capacity", 16], "the same tensor as past_key_values.0.key"),
    ):
        document = a_decoder_document()
        document["outputs"][index][key] = value
        refuse(document, f"outputs: .*{match}")


def test_m11_cache_of_a_variant():
    own = [dict(spec, dtype="int8") for spec in a_decoder_document()["inputs"][5:]]
    for cache in (own, own[:2]):
        document = a_decoder_document()
        document["variants"][0]["cache"] = cache
        parsed = Manifest.parse(json.dumps(document).encode())
        variant = parsed.variants[0]
        assert [spec.dtype for spec in parsed.inputs_of(variant)[5:]] == ["int8"] * len(cache)
        assert parsed.inputs_of(variant)[:5] == parsed.inputs[:5]
        assert Manifest.parse(parsed.to_json()) == parsed
    for cache, match in (
        (None, "the key is left out"),
        ([], "pair of key and value"),
        (own[:1], "pair of key and value"),
        (swapped(own, 0, 1), "'past_key_values.0.value' stands where past_key_values.0.key"),
        ([own[0], dict(own[1], dtype="float64")], "past_key_values.0.value is float64"),
        ([dict(own[0], shape=["batch", "heads", "capacity", 8]), own[1]], "are numbers"),
        ([{"name": own[0]["name"]}], "'dtype' is missing"),
        ("int8", "has the wrong type"),
    ):
        document = a_decoder_document()
        document["variants"][0]["cache"] = cache
        refuse(document, rf"variants\[0\].cache.*{match}")
    document = a_document()
    document["variants"][0]["cache"] = own
    refuse(document, r"variants\[0\].cache: the task text-classification has no KV cache")


def test_the_errors_are_of_the_tree():
    assert SchemaError.exit_code == IntegrityError.exit_code == 6
    with pytest.raises(SchemaError) as raised:
        Manifest.parse(json.dumps(a_document() | {"name": "a\n\x1b[31mb"}).encode())
    assert "\n" not in str(raised.value)
