"""Everything a user can get wrong, through the real command: one line that helps, the documented code, nothing lost."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from real_command import Finished, assert_refused, cold, command, environment, listing, warm

from artifacts.bundle import open_bundle
from artifacts.digest import sha256_bytes
from artifacts.manifest import FileEntry
from hasten.cli import COMMANDS

Sources = dict[str, Path]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with something in it that must not be lost."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "keep.txt").write_text("dear")
    return folder


def refused(place: Path, code: int, parts: tuple[str, ...], *arguments: str | Path) -> Finished:
    """Run in ``place`` and see that it is refused so, with --json too where the command has it; nothing may change."""
    before = listing(place)
    done = warm(*arguments, cwd=place)
    assert_refused(done, code, *parts)
    assert done.out == ""
    assert listing(place) == before
    return done


def compile_refused(place: Path, code: int, parts: tuple[str, ...], source: Path | str, *options: str | Path) -> None:
    refused(place, code, parts, "compile", source, "-o", place / "out", *options)


@pytest.fixture
def model(tmp_path: Path, sources: Sources) -> Path:
    """A text classifier to break."""
    return Path(shutil.copytree(sources["text-classification"], tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("nowhere/at/all", 3, ("no such model: nowhere/at/all", "pass a folder")),
        ("nobody/nothing", 3, ("nobody/nothing", "hub cannot be reached", "pass its folder")),
        ("keep.txt", 3, ("keep.txt is neither", "pass the folder")),
        (".", 3, ("has no config.json",)),
        ("", 2, ("the model source is empty",)),
    ],
)
def test_a_source_that_is_not_there(place: Path, source: str, code: int, says: tuple[str, ...]) -> None:
    compile_refused(place, code, says, source)


def test_missing_source_cold_and_as_json(place: Path) -> None:
    before = listing(place)
    done = cold("compile", "gone/model.onnx", "-o", "out", "--json", cwd=place)
    assert_refused(done, 3, "no such model: gone/model.onnx")
    assert done.document["error"] == "SourceError"
    assert done.document["exit"] == 3
    assert done.document["remedy"]
    assert done.err == f"hasten: {done.document['what']}. {done.document['remedy']}\n"
    assert listing(place) == before


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{nope", "config.json is not valid JSON"),
        ("config.json", b"[]", "does not hold a JSON object"),
        ("config.json", b"", "config.json is not valid JSON"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("model.safetensors", b"", "model.safetensors is empty"),
        ("model.safetensors", b"garbage" * 99, "is not a safetensors file"),
        ("tokenizer.json", b"{}", "corrupt tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json does not hold"),
    ],
)
def test_files_of_a_folder(place: Path, model: Path, file: str, content: bytes | None, says: str) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    compile_refused(place, 3, (says, str(model)), model)


def test_truncated_weights(place: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    compile_refused(place, 3, ("model.safetensors is truncated", "bytes expected"), model)


def test_no_tokenizer(place: Path, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    compile_refused(place, 3, ("holds no tokenizer", "tokenizer.json"), model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": None}, ("names no architectures", '"architectures": ["BertModel"]')),
        ({"architectures": []}, ("names no architectures",)),
        ({"architectures": ["FrobForThings"]}, ("no architecture FrobForThings", ".onnx")),
        ({"architectures": ["GPT2LMHeadModel"]}, ("do not belong together: GPT2LMHeadModel is of gpt2, not of bert",)),
        ({"architectures": ["ViTForImageClassification"]}, ("serves image-classification", "fill-mask")),
        ({"model_type": None}, ("names no model_type",)),
        ({"model_type": "frob"}, ("cannot be loaded", "frob")),
        ({"hidden_size": "32"}, ("cannot be loaded", "hidden_size")),
        ({"hidden_size": 48}, ("cannot be loaded",)),
        ({"vocab_size": -3}, ("cannot be loaded",)),
        ({"num_attention_heads": 5}, ("cannot be loaded", "number of attention heads")),
    ],
)
def test_configs(place: Path, model: Path, changes: dict[str, object], says: tuple[str, ...]) -> None:
    edit(model / "config.json", **changes)
    compile_refused(place, 3, says, model)


def test_tasks(place: Path, sources: Sources) -> None:
    model = sources["text-classification"]
    compile_refused(place, 2, ("unknown task 'frob'", "token-classification"), model, "--task", "frob")
    compile_refused(place, 3, ("serves text-classification, not fill-mask",), model, "--task", "fill-mask")
    compile_refused(place, 2, ("--pooling mean has no meaning",), model, "--pooling", "mean")
    compile_refused(place, 3, ("needs a tokenizer",), sources["mlp"], "--task", "text-classification")


def write_graph(path: Path, *nodes: onnx.NodeProto, opset: int = 18, shape: list[int | str] | None = None) -> Path:
    """A graph from x to y, valid or not."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("node", "opset", "says"),
    [
        (helper.make_node("Frobnicate", ["x"], ["y"], "the_node"), 18, ("Frobnicate", "node the_node")),
        (helper.make_node("Frob", ["x"], ["y"], "n7", domain="acme"), 18, ("acme::Frob", "node n7")),
        (helper.make_node("Relu", ["x"], ["y"], "r"), 99, ("opset 99", "opset 17 to 24")),
        (helper.make_node("Scan", ["x", "x"], ["y"], "sc", num_inputs=1), 8, ("opset 8", "scan")),
        (helper.make_node("Upsample", ["x"], ["y"], "up", height_scale=2.0, width_scale=2.0), 1, ("Upsample", "up")),
        (helper.make_node("Relu", ["nowhere"], ["y"], "r"), 18, ("nowhere",)),
        (helper.make_node("Relu", ["y"], ["y"], "r"), 18, ("does not run", "broken.onnx")),
        (helper.make_node("Log", ["x"], ["y"], "l"), 18, ("not finite", "broken.onnx")),
    ],
)
def test_graphs(place: Path, tmp_path: Path, node: onnx.NodeProto, opset: int, says: tuple[str, ...]) -> None:
    shape: list[int | str] = [1, 1, 4, 4]
    compile_refused(place, 3, says, write_graph(tmp_path / "broken.onnx", node, opset=opset, shape=shape))


def test_graph_defined_twice_and_without_shapes(place: Path, tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"], "r")
    compile_refused(place, 3, ("is corrupt", "y"), write_graph(tmp_path / "twice.onnx", relu, relu, shape=[4]))
    compile_refused(place, 3, ("states no shape for x",), write_graph(tmp_path / "shapeless.onnx", relu))


def test_files_that_are_no_onnx(place: Path, tmp_path: Path, mlp: Path) -> None:
    whole = mlp.read_bytes()
    contents = {"empty": b"", "cut": whole[:3000], "short": whole[:-40], "garbage": b"\x00\xffgarbage" * 300}
    for name, content in contents.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        compile_refused(place, 3, (str(path), "is empty" if name == "empty" else "is corrupt"), path)
    (tmp_path / "folder.onnx").mkdir()
    compile_refused(place, 3, ("folder.onnx has no config.json",), tmp_path / "folder.onnx")


# Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "columns", "code", "says"),
    [
        ("a.txt", b"", None, 4, ("a.txt is empty",)),
        ("a.txt", b"\n \n", None, 4, ("a.txt is empty",)),
        ("a.txt", b"caf\xe9\n", None, 4, ("is not UTF-8: byte 3", "line 1", "convert it")),
        ("a.txt", b"x" * (3 << 20), None, 4, ("line 1 of", "longer than 1,000,000 bytes")),
        ("a.csv", b"text,label\n" + b"x" * (3 << 20) + b",1\n", None, 4, ("line 2 of", "longer than")),
        ("a.csv", b"a,b\n1,2\n", "text=c", 4, ("has no column c",)),
        ("a.csv", b"text,b\n1,2\n", "text=c", 4, ("has no column c", "its columns are text, b")),
        ("a.csv", b"text,b\n1,2\n", "text=7", 4, ("has no column 7",)),
        ("a.csv", b"a,b\n1,2\n", None, 4, ("2 columns without names", "--columns")),
        ("a.csv", b"text,b\n1,2\n", "frob=b", 2, ("unknown part 'frob'",)),
        ("a.csv", b"text,b\n1,2\n", "", 2, ("--columns ''",)),
        ("a.csv", b"text,b\n1,2\n", "text=", 2, ("names no column for text",)),
        ("a.csv", b"text,label\nhello\n", None, 4, ("line 2 of", "has 1 column")),
        ("a.csv", b'text,label\n"hello\n', None, 4, ("not valid CSV",)),
        ("a.jsonl", b'{"text": "a"}\n{nope\n', None, 4, ("line 2 of", "is not JSON")),
        ("a.jsonl", b'{"text": 5}\n', None, 4, ("line 1 of", "as text")),
        ("a.jsonl", b'{"words": "a"}\n', None, 4, ("no column", "words")),
        ("a.pdf", b"a", None, 4, ("unknown suffix .pdf", ".jsonl")),
    ],
)
def test_data(
    place: Path,
    tmp_path: Path,
    sources: Sources,
    name: str,
    content: bytes,
    columns: str | None,
    code: int,
    says: tuple[str, ...],
) -> None:
    data = tmp_path / name
    data.write_bytes(content)
    options = ["--data", data] if columns is None else ["--data", data, "--columns", columns]
    compile_refused(place, code, says, sources["text-classification"], *options)


def test_data_that_is_not_there(place: Path, sources: Sources) -> None:
    model = sources["text-classification"]
    compile_refused(place, 4, ("no data file gone.txt",), model, "--data", "gone.txt")
    compile_refused(place, 4, ("no data file .",), model, "--data", ".")
    compile_refused(place, 2, ("--columns", "--data"), model, "--columns", "text=c")


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        *(("compile", "--threads", value) for value in ("0", "-2", "x", "100000")),
        *(("compile", "--seed", value) for value in ("-1", "1.5")),
        *(("compile", "--max-drop", value) for value in ("-1", "-0.1%", "nan", "100%", "1001%", "x", "")),
        *(("compile", "--target", value) for value in ("frob", "")),
        *(("run", "--max-tokens", value) for value in ("0", "-5")),
        *(("run", "--threads", value) for value in ("0", "-1", "99999999999")),
        *(("bench", "--batches", value) for value in ("0", "1,-1", "", "x")),
        *(("bench", "--lengths", value) for value in ("0", "1,,2")),
        *(("bench", "--seconds", value) for value in ("0", "-1", "nan")),
        *(("bench", "--threads", value) for value in ("0", "-1")),
        ("prove", "--threads", "0"),
    ],
)
def test_numbers_that_make_no_sense(place: Path, mlp: Path, mlp_bundle: Path, option: tuple[str, str, str]) -> None:
    command, name, value = option
    arguments = [mlp, "-o", "out"] if command == "compile" else [mlp_bundle]
    refused(place, 2, (name.strip("-"),), command, *arguments, f"{name}={value}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("frob",), ("No such command 'frob'", "--help")),
        (("compile",), ("Missing argument 'SOURCE'",)),
        (("compile", "x.onnx"), ("Missing option", "--output")),
        (("inspect", "x", "--frob"), ("--frob",)),
        (("inspect", "x", "y"), ("extra argument",)),
    ],
)
def test_usage(place: Path, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    refused(place, 2, says, *arguments)


def test_no_arguments_is_help_and_every_command_has_help(place: Path) -> None:
    done = cold(cwd=place)
    assert done.code == 2
    assert done.err.startswith("Usage: hasten")
    assert all(f"  {name} " in done.err for name in COMMANDS)
    for name in COMMANDS:
        shown = warm(name, "--help", cwd=place)
        assert shown.code == 0
        assert shown.out.startswith(f"Usage: hasten {name}")


@pytest.mark.parametrize("name", ["a\x1b[31mb", "two\nlines", "x" * 5000, ""])
def test_names_of_models(place: Path, mlp: Path, name: str) -> None:
    compile_refused(place, 2, ("the name",), mlp, "--name", name)


RECIPE = 'schema = 1\nname = "mine"\ndescription = "d"\ntune = false\n[stages]\ndefault = ["{stage}"]\n'


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (None, ("no recipe", "reference, safe, balanced")),
        (RECIPE.format(stage="frob-pass"), ("unknown pass 'frob-pass'", "dynamic-int8")),
        (RECIPE.format(stage="dynamic-int8(frob=1)"), ("no option 'frob'",)),
        (RECIPE.format(stage="dynamic-int8(reduce_range=7)"), ("reduce_range",)),
        (RECIPE.format(stage="finish").replace("schema = 1", "schema = 2"), ("schema 2",)),
        (RECIPE.format(stage="finish").replace("default", "frob"), ("default",)),
        ("[[", ("is not TOML",)),
        ("", ("schema None",)),
    ],
)
def test_recipes(place: Path, tmp_path: Path, mlp: Path, recipe: str | None, says: tuple[str, ...]) -> None:
    path = tmp_path / "mine.toml"
    if recipe is not None:
        path.write_text(recipe)
    compile_refused(place, 2, says, mlp, "--recipe", path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('target = "cpu"', 'target = "frob"'),
        ('pipeline = "', 'pipeline = "frob-pass; '),
        ('id = "', 'id = "../../'),
        ('optimization_level = "all"', 'optimization_level = "frob"'),
        ("tolerance = ", "tolerance = -"),
        ("schema = 3", "schema = 1"),
        ("schema = 3", "schema = 3\nfrob = 1"),
        ("[[variant]]", "[[frob]]"),
    ],
)
def test_plans_that_were_altered(place: Path, tmp_path: Path, mlp: Path, mlp_bundle: Path, old: str, new: str) -> None:
    text = (mlp_bundle / "plan.toml").read_text()
    assert old in text
    plan = tmp_path / "plan.toml"
    plan.write_text(text.replace(old, new))
    compile_refused(place, 2, ("plan",), mlp, "--plan", plan)


def test_plans_of_something_else(place: Path, tmp_path: Path, sources: Sources, mlp: Path, mlp_bundle: Path) -> None:
    compile_refused(place, 2, ("no plan at gone",), mlp, "--plan", "gone")
    compile_refused(place, 2, ("no plan at",), mlp, "--plan", sources["text-classification"])
    compile_refused(place, 2, ("is not TOML",), mlp, "--plan", mlp)
    other = write_graph(tmp_path / "other.onnx", helper.make_node("Relu", ["x"], ["y"], "r"), shape=[4])
    compile_refused(place, 2, ("plan was made for another model",), other, "--plan", mlp_bundle)
    compile_refused(place, 2, ("the plan was made for",), sources["text-classification"], "--plan", mlp_bundle)


# Outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (".", ("exists and is no sound bundle", "--force")),
        ("", ("exists and is no sound bundle",)),
        ("keep.txt", ("keep.txt exists and is no sound bundle",)),
        ("keep.txt/out", ("keep.txt is no folder",)),
        ("gone/out", ("does not exist", "make that folder first")),
        ("/", ("root of a file system",)),
        ("/dev/null/out", ("/dev/null is no folder",)),
        ("x" * 300, ("too long",)),
        ("\udcff", ("not UTF-8",)),
    ],
)
def test_places_that_cannot_be(place: Path, mlp: Path, mlp_bundle: Path, out: str, says: tuple[str, ...]) -> None:
    refused(place, 5, says, "compile", mlp, "-o", out, "--recipe", "reference")


def test_force_does_not_take_the_working_folder(place: Path, mlp: Path) -> None:
    refused(place, 5, ("the working folder",), "compile", mlp, "-o", ".", "--force")
    refused(place, 5, ("the working folder",), "compile", mlp, "-o", "..", "--force")


def test_a_damaged_bundle_is_not_replaced_unasked(place: Path, mlp: Path, mlp_bundle: Path) -> None:
    shutil.copytree(mlp_bundle, place / "out")
    (place / "out" / "notes.txt").write_text("mine")
    compile_refused(place, 5, ("exists and is no sound bundle", "notes.txt", "--force"), mlp, "--recipe", "reference")


def test_no_permission(place: Path, mlp: Path) -> None:
    place.chmod(0o555)
    try:
        before = listing(place)
        done = warm("compile", mlp, "-o", place / "out", "--recipe", "reference", powerless=True)
        assert_refused(done, 5, "may not be written", "choose a place")
        assert listing(place) == before
    finally:
        place.chmod(0o755)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_full(small_disk: Path, mlp: Path) -> None:
    (small_disk / "keep.txt").write_text("dear")
    before = listing(small_disk)
    done = warm("compile", mlp, "-o", small_disk / "out", "--recipe", "reference", "--json")
    assert_refused(done, 5, "no space left", "free space on the disk", str(small_disk / "out"))
    assert done.document["error"] == "OutputError"
    assert listing(small_disk) == before


def test_disk_full_over_an_old_bundle(small_disk: Path, mlp: Path, mlp_bundle: Path) -> None:
    shutil.copytree(mlp_bundle, small_disk / "out")
    before = listing(small_disk)
    done = warm("compile", mlp, "-o", small_disk / "out", "--recipe", "reference")
    assert_refused(done, 5, "no space left")
    assert listing(small_disk) == before
    assert open_bundle(small_disk / "out").manifest.name == "mlp"


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_file_too_large_for_the_disk(place: Path, mlp: Path, limit: int) -> None:
    before = listing(place)
    done = warm("compile", mlp, "-o", place / "out", "--recipe", "reference", file_limit=limit)
    assert_refused(done, 5, "too large", "free space")
    assert listing(place) == before


def test_outputs_of_run(place: Path, mlp_bundle: Path) -> None:
    row = json.dumps({"x": [[0.0] * 64]})
    refused(place, 5, ("cannot be written",), "run", mlp_bundle, row, "-o", "gone/out")
    refused(place, 5, ("is a folder",), "run", mlp_bundle, row, "-o", ".")
    refused(place, 2, ("texts and --input",), "run", mlp_bundle, row, "-i", "keep.txt")
    refused(place, 4, ("gone cannot be read",), "run", mlp_bundle, "-i", "gone")
    # What went well before the bad line is not left behind either.
    (place / "rows.jsonl").write_text(f'{row}\n{row}\n{{"x": "nonsense"}}\n')
    refused(place, 4, ("rows.jsonl, line 3",), "run", mlp_bundle, "-i", "rows.jsonl", "-o", "out.jsonl")


# Bundles ----------------------------------------------------------------------------------------------------------

BUNDLE_COMMANDS = ("inspect", "verify", "run", "bench", "pack", "prove")


@pytest.fixture
def bundle(place: Path, mlp_bundle: Path) -> Path:
    """A bundle to break."""
    return Path(shutil.copytree(mlp_bundle, place / "bundle"))


def every_command_refuses(place: Path, path: Path, *says: str) -> None:
    for name in BUNDLE_COMMANDS:
        refused(place, 6, says, name, path, *(["{}"] if name == "run" else []))


def test_a_bundle_from_a_newer_schema(place: Path, bundle: Path) -> None:
    edit(bundle / "manifest.json", schema=2)
    every_command_refuses(place, bundle, "manifest.json: schema 2", "newer hasten", "upgrade")
    done = cold("inspect", bundle, "--json")
    assert_refused(done, 6, "newer hasten")
    assert done.document["error"] == "SchemaError"


def test_a_bundle_with_one_altered_byte(place: Path, bundle: Path) -> None:
    weights = next((bundle / "weights").iterdir())
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    every_command_refuses(place, bundle, weights.name, "altered", "get the bundle again")
    done = cold("run", bundle, "{}")
    assert_refused(done, 6, weights.name)
    broken = warm("doctor", bundle, "--json")
    assert broken.code == 1
    assert [check["name"] for check in broken.document if check["status"] == "broken"] == ["bundle"]


def test_what_is_no_bundle(place: Path, sources: Sources, mlp: Path) -> None:
    every_command_refuses(place, place / "gone", "gone does not exist", "hasten compile")
    every_command_refuses(place, place, "is no bundle", "manifest.json")
    for name in BUNDLE_COMMANDS:
        if name != "inspect":  # of a model it tells whether it can be compiled
            records = ["{}"] if name == "run" else []
            refused(place, 6, ("looks like a model: compile it first",), name, sources["text-classification"], *records)
    every_command_refuses(place, mlp, "mlp.onnx is no folder")
    every_command_refuses(place, Path("\udcff"), "does not exist")
    every_command_refuses(place, Path("x" * 5000), "too long")


def test_files_missing_and_extra(place: Path, bundle: Path) -> None:
    (bundle / "golden.npz").rename(place / "golden.npz")
    every_command_refuses(place, bundle, "golden.npz is missing")
    (place / "golden.npz").rename(bundle / "golden.npz")
    (bundle / "extra.bin").write_bytes(b"x")
    every_command_refuses(place, bundle, "extra.bin", "not listed")


def test_verify_of_wrong_golden_outputs(bundle: Path) -> None:
    """Hashes all right, and another model's numbers: only running it tells."""
    opened = open_bundle(bundle)
    golden = bundle / "golden.npz"
    with np.load(golden) as archive:
        arrays = {name: array * 1.5 if name.startswith("output.") else array for name, array in archive.items()}
    np.savez(golden, **arrays)
    entry = FileEntry("golden.npz", golden.stat().st_size, sha256_bytes(golden.read_bytes()))
    files = tuple(entry if file.path == "golden.npz" else file for file in opened.manifest.files)
    manifest = replace(opened.manifest, files=files).to_json()
    (bundle / "manifest.json").write_bytes(manifest)
    proof = replace(opened.proof, bundle=f"sha256:{sha256_bytes(manifest)}")
    (bundle / "proof.json").write_bytes(proof.to_json())
    done = warm("verify", bundle)
    assert_refused(done, 6, "reference on CPUExecutionProvider", "golden")
    assert "failed" in done.out
    done = warm("verify", bundle, "--json")
    assert_refused(done, 6, "reference on CPUExecutionProvider")
    assert [finding["status"] for finding in done.document].count("failed") == 1
    assert_refused(warm("run", bundle, "{}"), 8, "golden")


def test_packed_files(place: Path, bundle: Path, mlp: Path) -> None:
    packed = place / "b.hasten"
    assert warm("pack", bundle, packed).code == 0
    whole = packed.read_bytes()
    (place / "cut.hasten").write_bytes(whole[:-50])
    refused(place, 6, ("cut.hasten", "cut off"), "unpack", "cut.hasten")
    (place / "flip.hasten").write_bytes(whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:])
    refused(place, 6, ("flip.hasten",), "unpack", "flip.hasten", "new")
    refused(place, 6, ("is no sound packed bundle",), "unpack", mlp, "new")
    refused(place, 6, ("gone.hasten cannot be read",), "unpack", "gone.hasten")
    refused(place, 6, ("is no file",), "unpack", bundle, "new")
    refused(place, 2, ("no suffix",), "unpack", "gone")
    refused(place, 5, ("exists and is no sound bundle",), "unpack", packed, place)
    refused(place, 5, ("is no packed bundle",), "pack", bundle, "keep.txt")
    refused(place, 6, ("is a packed bundle", "hasten unpack"), "inspect", packed)


def test_wishes_that_cannot_be_met(place: Path, mlp_bundle: Path) -> None:
    for wish, code, says in (
        (("--device", "frob"), 2, "unknown device 'frob'"),
        (("--device", "cuda:99"), 8, "cuda:99"),
        (("--provider", "frob"), 2, "unknown execution provider 'frob'"),
        (("--provider", "cuda"), 8, "cuda"),
        (("--variant", "frob"), 2, "no variant 'frob'"),
    ):
        refused(place, code, (says,), "run", mlp_bundle, "{}", *wish)
    quick = ("--batches", "1", "--seconds", "0.01")
    refused(place, 6, ("frob does not exist",), "bench", mlp_bundle, "--against", "frob", *quick)


def test_records_that_do_not_fit(place: Path, mlp_bundle: Path) -> None:
    for record, says in (
        ("hello", "JSON object"),
        ('{"z": 1}', "x"),
        ('{"x": "text"}', "x"),
        ('{"x": [[1, 2]]}', "x"),
        ('{"x": [[1], [2, 3]]}', ""),
        ("{nope", "json"),
    ):
        (place / "rows.jsonl").write_text(f'{{"x": [{[0.0] * 64}]}}\n{record}\n')
        refused(place, 4, ("rows.jsonl, line 2", says), "run", mlp_bundle, "-i", "rows.jsonl", "-o", "out.jsonl")
    refused(place, 4, ("is a JSON object",), "run", mlp_bundle, "hello")


# Environments -----------------------------------------------------------------------------------------------------


def test_two_onnx_runtimes(tmp_path: Path) -> None:
    fake = tmp_path / "onnxruntime-9.9.9.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 9.9.9\n")
    (fake / "top_level.txt").write_text("onnxruntime\n")
    both = f"{environment()['PYTHONPATH']}{os.pathsep}{tmp_path}"
    done = cold("doctor", env=environment(PYTHONPATH=both))
    assert done.code == 1
    assert "Traceback" not in done.err
    line = next(line for line in done.out.splitlines() if line.startswith("broken"))
    assert "onnxruntime 9.9.9" in line
    assert "onnxruntime-gpu" in line
    assert "pip uninstall -y" in line
    done = cold("doctor", "--json", env=environment(PYTHONPATH=both))
    assert done.code == 1
    assert [check["name"] for check in done.document if check["status"] == "broken"] == ["onnxruntime"]


def test_a_reader_that_hangs_up(mlp_bundle: Path) -> None:
    row = json.dumps({"x": [[0.0] * 64]})
    run = shlex.join([*command(), "run", str(mlp_bundle)])
    line = f"yes {shlex.quote(row)} | head -n 5000 | {run} | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment(), timeout=120)
    assert len(json.loads(done.stdout)["y"][0]) == 8
    assert done.stderr == b""


def test_a_task_without_a_processor_has_no_texts(
    place: Path, bundle_of: Callable[[str], tuple[Path, Finished]]
) -> None:
    path, _ = bundle_of("mlp")
    refused(place, 4, ("JSON object",), "run", path, "")
