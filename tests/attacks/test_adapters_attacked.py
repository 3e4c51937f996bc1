"""Every MUST of docs/format.md on adapters, broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_builders import a_decoder_manifest, a_manifest

from artifacts.adapters import AdaptedGraph, AdaptedModule, Adapter, Part, Product
from artifacts.errors import BundleError, SchemaError
from artifacts.manifest import FileEntry, Manifest
from runtimes.generate.adapters import AdapterWeights, read_adapter

Q, K = AdaptedModule("layers.0.q", 6, 4, 2), AdaptedModule("layers.0.k", 6, 2, 1)
GRAPH = AdaptedGraph(
    "cpu-fp32.adapters.onnx",
    (Product(6, (Part("layers.0.q", 2, 2), Part("layers.0.k", 0, 2, 0.5), Part("layers.0.q", 0, 2))),),
)
NUMBERS = 2 * (6 + 4) + 1 * (6 + 2)


def an_adapter(name: str = "style") -> Adapter:
    return Adapter(name, f"adapters/{name}.bin", f"sha256:{'2' * 64}", "org/tiny", (Q, K))


def an_adapted_manifest(*names: str) -> Manifest:
    """A decoder's manifest with adapters."""
    adapters = tuple(an_adapter(name) for name in names or ("style",))
    plain = a_decoder_manifest()
    files = [FileEntry(one.weights, one.size, "d" * 64) for one in adapters]
    files.append(FileEntry(GRAPH.model, 5, "e" * 64))
    (variant,) = plain.variants
    listed = tuple(sorted((*plain.files, *files), key=lambda entry: entry.path))
    return replace(plain, adapters=adapters, variants=(replace(variant, adapted=GRAPH),), files=listed)


def a_document(*names: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(an_adapted_manifest(*names).to_json())
    return document


def refuse(document: dict[str, Any], match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        Manifest.parse(json.dumps(document).encode())


def test_a_manifest_with_adapters_is_read_back():
    manifest = an_adapted_manifest("style", "terse")
    assert Manifest.parse(manifest.to_json()) == manifest
    assert an_adapter().size == 4 * NUMBERS


def test_a_manifest_without_them_has_the_bytes_that_it_had():
    for manifest in (a_decoder_manifest(), a_manifest()):
        assert b"adapt" not in manifest.to_json()


def test_m12_adapters():
    wrong: list[tuple[str, Any, str]] = [
        ("name", "Style", "does not match"),
        ("name", "terse", "is not 'adapters/terse.bin'"),
        ("weights", "weights/style.bin", "is not 'adapters/style.bin'"),
        ("source", "sha256:0", "does not match"),
        ("modules", [], "at least one is needed"),
        ("modules", a_document()["adapters"][0]["modules"] * 2, "a module stands twice"),
        ("base", "x" * 257, "does not match"),
    ]
    for key, value, match in wrong:
        document = a_document()
        document["adapters"][0][key] = value
        refuse(document, match)
    for key, value in (("rank", 0), ("rank", 4097), ("rows", 0), ("columns", -1), ("path", "a/b")):
        document = a_document()
        document["adapters"][0]["modules"][0][key] = value
        refuse(document, r"adapters\[0\].modules\[0\]")
    document = a_document()
    document["adapters"][0]["modules"][0]["rank"] = 3
    refuse(document, f"has {4 * NUMBERS} bytes, its modules {4 * (NUMBERS + 10)}")
    document = a_document("style", "terse")
    document["adapters"][1] = document["adapters"][0]
    refuse(document, "'style' stands twice")
    document = a_document()
    document["files"] = [entry for entry in document["files"] if not entry["path"].startswith("adapters/")]
    refuse(document, "'adapters/style.bin' is not listed")
    document = a_document("style", "terse")
    del document["adapters"][1]
    refuse(document, "no adapter has 'adapters/terse.bin'")
    document = a_document()
    document["adapters"] = None
    refuse(document, "not null")
    document["adapters"] = []
    refuse(document, "left out where there are none")
    document = json.loads(a_manifest(("weights/" + "a" * 64 + ".bin",)).to_json())
    document["adapters"] = a_document()["adapters"]
    with pytest.raises(SchemaError):
        Manifest.parse(json.dumps(document).encode())
    refuse(a_document(*(f"a{number}" for number in range(257))), "257 adapters")


def test_m13_graphs_that_take_adapters():
    document = a_document()
    del document["variants"][0]["adapted"]
    refuse(document, "come together")
    document = a_document()
    del document["adapters"]
    document["files"] = [entry for entry in document["files"] if not entry["path"].startswith("adapters/")]
    refuse(document, "come together")
    document = a_document()
    document["variants"][0]["adapted"]["model"] = "cpu-fp32.onnx"
    refuse(document, "is not 'cpu-fp32.adapters.onnx'")
    document = a_document()
    document["files"] = [entry for entry in document["files"] if entry["path"] != GRAPH.model]
    refuse(document, "is not listed")
    document = a_document()
    document["variants"].append(
        {**document["variants"][0], "id": "cpu-fp32.adapters", "model": "cpu-fp32.adapters.onnx", "adapted": None}
    )
    del document["variants"][1]["adapted"]
    refuse(document, "is the graph of a variant")
    parts: list[list[tuple[str, int, int]]] = [
        [("layers.0.q", 2, 2), ("layers.0.k", 0, 2)],
        [("layers.0.q", 0, 2), ("layers.0.q", 0, 2), ("layers.0.k", 0, 2)],
        [("layers.0.q", 0, 4), ("layers.0.q", 4, 1), ("layers.0.k", 0, 2)],
        [("layers.0.q", 0, 4)],
        [],
    ]
    for some in parts:
        document = a_document()
        keys = ("module", "start", "columns")
        made = [{**dict(zip(keys, part, strict=True)), "factor": 1.0} for part in some]
        document["variants"][0]["adapted"]["products"][0]["parts"] = made
        refuse(document, r"products: (the adapter style changes|a product has no columns)")
    document = a_document()
    document["variants"][0]["adapted"]["products"][0]["rows"] = 7
    refuse(document, "no such module")
    document = a_document()
    document["variants"][0]["adapted"]["products"][0]["parts"][0]["factor"] = 0.0
    refuse(document, "is no factor")


def write(folder: Path, numbers: Any) -> Path:
    (folder / "adapters").mkdir(exist_ok=True)
    (folder / "adapters" / "style.bin").write_bytes(np.asarray(numbers, "<f4").tobytes())
    return folder


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_m14_numbers_of_an_adapter(tmp_path: Path, wrong: float):
    numbers = np.arange(NUMBERS, dtype=np.float32)
    read_adapter(write(tmp_path, numbers), an_adapter(), GRAPH)
    numbers[-1] = wrong
    with pytest.raises(BundleError, match="not finite"):
        read_adapter(write(tmp_path, numbers), an_adapter(), GRAPH)


@pytest.mark.parametrize("count", [0, NUMBERS - 1, NUMBERS + 1])
def test_a_file_that_was_cut_or_grew_after_opening_is_refused(tmp_path: Path, count: int):
    with pytest.raises(BundleError, match=f"has not the {4 * NUMBERS} bytes"):
        read_adapter(write(tmp_path, np.zeros(count)), an_adapter(), GRAPH)
    (tmp_path / "adapters" / "style.bin").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        read_adapter(tmp_path, an_adapter(), GRAPH)


def test_columns_are_cut_up_and_multiplied_as_the_parts_say(tmp_path: Path):
    numbers = np.random.default_rng(0).standard_normal(NUMBERS).astype(np.float32)
    (factors,) = read_adapter(write(tmp_path, numbers), an_adapter(), GRAPH)
    q_a, q_b = numbers[:12].reshape(6, 2), numbers[12:20].reshape(2, 4)
    k_a, k_b = numbers[20:26].reshape(6, 1), numbers[26:].reshape(1, 2)
    q, k = q_a @ q_b, k_a @ k_b
    np.testing.assert_allclose(factors.a @ factors.b, np.hstack([q[:, 2:], 0.5 * k, q[:, :2]]), atol=1e-6)
    weights = AdapterWeights(GRAPH, {"style": (factors,)})
    assert [array.shape for array in weights.feeds(["", ""]).values()] == [(6, 0), (0, 6), (2, 1, 0)]
    rows = weights.feeds(["", "style"])["adapters.0.rows"]
    assert rows.tolist() == [[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]]
