"""A PEFT folder becomes part of a bundle: whatever the passes made of its products, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from lora_folders import ALL, change_config, with_lora, write_lora
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from tiny_decoders import write_decoder

from artifacts.bundle import Bundle, BundleWriter, open_bundle
from artifacts.errors import FidelityError, HastenError, SourceError, UnsupportedError, UsageError
from artifacts.manifest import Manifest, SessionOptions, Source, Variant
from artifacts.proof import Proof
from artifacts.target import CPU
from compiler.adapters import add_adapter, remove_adapter
from compiler.adapters.peft import read_lora
from compiler.export import export_model
from compiler.generation import prefill
from compiler.source import read_source
from passes.base import Context
from passes.origins import origins_of
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN
from runtimes.generate.adapters import open_graph
from runtimes.golden import load_golden, relative_error
from runtimes.load import load

FUSED = (
    "raise-opset(minimum=23); unflatten-products; fuse-rms-norm; fuse-layer-norm; fuse-gelu; fuse-silu; fuse-rotary; "
    "fold-scale; order-columns; pack-products; pack-attention; fuse-skip-layer-norm; fuse-bias-gelu; hoist-shapes; "
    "static-reshapes; merge-duplicates; remove-unused; hoist-gather"
)
FLOAT32 = 1e-5
"""Of two layers in float32: 1e-6 for each sum of at most a few hundred products, some of it cancelled in the logits."""


def write_bundle(out: Path, folder: Path, pipeline: str, *, tolerance: float = FLOAT32) -> Bundle:
    """A bundle of a tiny model and these passes, without a search; golden outputs are torch's."""
    source = read_source(str(folder), "text-generation")
    exported = export_model(source)
    model = exported.model
    passes = Pipeline((*CLEAN, *parse(pipeline).passes, *parse("finish").passes))
    passes.run(model, Context(CPU))
    rows = [np.arange(5, 12), np.arange(40, 44)]
    feeds = prefill(rows, exported.inputs, np.array([[5, 6], [2, 3]]))
    assert exported.reference is not None
    golden = io.BytesIO()
    logits = exported.reference(feeds)["logits"]
    np.savez(golden, **{f"input.{name}": array for name, array in feeds.items()}, **{"output.logits": logits})
    with BundleWriter(out) as writer:
        writer.add_bytes("cpu-fp32.onnx", ir.to_proto(model).SerializeToString())
        writer.add_bytes("golden.npz", golden.getvalue())
        for path, content in exported.files.items():
            writer.add_bytes(path, content)
        session = SessionOptions()
        variant = Variant(
            "cpu-fp32", "cpu", CPU.providers, "cpu-fp32.onnx", "fp32", str(passes), session, tolerance, ()
        )
        manifest = Manifest(
            name="tiny",
            task="text-generation",
            source=Source(source.name, source.kind, source.digest, source.architecture),
            toolchain=(),
            inputs=exported.inputs,
            outputs=exported.outputs,
            processor=exported.processor,
            variants=(variant,),
            files=(),
            generation=exported.generation,
        )
        return writer.commit(manifest, Proof("", (), ()))


def load_torch(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``: a tiny Llama; ``bundle``: the same with its products packed; ``lora``: an adapter for it."""
    root = tmp_path_factory.mktemp("adapters")
    write_decoder(root / "source")
    write_bundle(root / "bundle", root / "source", FUSED)
    write_lora(root / "lora", load_torch(root / "source"), base="some/source")
    return root


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """Copies of the bundle and the adapter, for one test to change."""
    for name in ("bundle", "lora"):
        shutil.copytree(base / name, tmp_path / name)
    return tmp_path


def logits_of(bundle: Bundle, rows: list[str]) -> Any:
    """The golden prompts, each with an adapter."""
    (variant,) = bundle.manifest.variants
    assert variant.adapted is not None
    session = open_graph(bundle, variant, variant.adapted)
    try:
        return session.session.run({**load_golden(bundle).feeds, **session.feeds(rows)})["logits"]
    finally:
        session.close()


def torch_logits(model: Any, bundle: Bundle) -> Any:
    """The same of a torch model."""
    import torch

    feeds = load_golden(bundle).feeds
    found = []
    for ids, last, places in zip(feeds["input_ids"], feeds["seqlens_k"], feeds["logits_index"], strict=True):
        with torch.inference_mode():
            found.append(model(input_ids=torch.tensor(ids[None, : last + 1])).logits[0].numpy()[places])
    return np.stack(found)


ARCHITECTURES: dict[str, Any] = {
    "Llama": ALL,
    "Qwen2": "all-linear",  # biases
    "GPT-NeoX": ["query_key_value", "dense", "dense_4h_to_h"],  # columns are sorted
    "GPT-2": ["c_attn", "c_proj", "c_fc"],  # weights lie the other way round
    "Granite": "all-linear",  # factors are folded into weights
    "Phi-3": ["qkv_proj", "gate_up_proj", "down_proj"],  # modules that are packed in the original
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARCHITECTURES)[1:])
def test_other_architectures_give_the_logits_of_peft(tmp_path: Path, name: str):
    check_architecture(tmp_path, name, FUSED)


@pytest.mark.parametrize("pipeline", ["", "unflatten-products; pack-products"])
def test_a_graph_gives_the_logits_of_peft(tmp_path: Path, pipeline: str):
    check_architecture(tmp_path, "Llama", pipeline)


def check_architecture(folder: Path, name: str, pipeline: str) -> None:
    source = write_decoder(folder / "source", name)
    bundle = write_bundle(folder / "bundle", source, pipeline)
    wrapped = with_lora(load_torch(source), ARCHITECTURES[name])
    wrapped.save_pretrained(folder / "lora")
    added = add_adapter(bundle.path, folder / "lora", "style", any_base=True, against=str(source))
    wanted = torch_logits(wrapped, bundle)
    assert relative_error(logits_of(added.bundle, ["style", "style"]), wanted) < FLOAT32
    (one,) = added.agreement
    assert one.error < FLOAT32
    assert one.effect > 0.05


def test_rows_have_adapters_of_their_own(place: Path, base: Path):
    torch_model = load_torch(base / "source")
    options: dict[str, Any] = {"targets": r".*layers\.1\..*(q_proj|down_proj)", "rank": 3, "lora_alpha": 5}
    write_lora(place / "narrow", torch_model, seed=9, use_rslora=True, **options)
    add_adapter(place / "bundle", place / "lora", "wide", any_base=True)
    added = add_adapter(place / "bundle", place / "narrow", "narrow")
    assert [one.name for one in added.bundle.manifest.adapters or ()] == ["narrow", "wide"]
    assert [len(one.modules) for one in added.bundle.manifest.adapters or ()] == [2, 14]
    wide = torch_logits(with_lora(torch_model), added.bundle)
    narrow = torch_logits(with_lora(torch_model, seed=9, use_rslora=True, **options), added.bundle)
    plain = load_golden(added.bundle).outputs["logits"]
    found = logits_of(added.bundle, ["narrow", "wide"])
    assert relative_error(found[0], narrow[0]) < FLOAT32
    assert relative_error(found[1], wide[1]) < FLOAT32
    found = logits_of(added.bundle, ["", "narrow"])
    assert relative_error(found[0], plain[0]) < FLOAT32
    assert relative_error(found[1], narrow[1]) < FLOAT32


ROUNDED = 2 * 14**0.5 * 2.5 / 127 / 12**0.5
"""Of int8 products: what goes in is rounded to 1 / 127 of the largest of some numbers, which is about 2.5 of their
standard deviations; 14 products on the way, and twice that for what their noise does to each other."""


@pytest.mark.parametrize(
    ("passes", "allowed"),
    [
        ("weight-only(block_size=32, accuracy_level=1, skip=[*lm_head*])", FLOAT32),
        ("weight-only(bits=8, block_size=32, skip=[*lm_head*])", ROUNDED),
        ("weight-only(block_size=32, accuracy_level=1, skip=[*lm_head*]); prompt-int8", ROUNDED),
    ],
)
def test_a_quantized_base_gives_its_own_weights_and_the_adapter(
    base: Path, tmp_path: Path, passes: str, allowed: float
):
    """Against torch with the weights that were rounded."""
    bundle = write_bundle(tmp_path / "bundle", base / "source", f"{FUSED}; {passes}", tolerance=1.0)
    rounded = load_torch(base / "source")
    put_rounded(rounded, bundle)
    added = add_adapter(bundle.path, base / "lora", "style", any_base=True)
    wanted = torch_logits(with_lora(rounded), bundle)
    plain = torch_logits(rounded, bundle)
    assert relative_error(logits_of(added.bundle, ["", ""]), plain) < allowed
    assert relative_error(logits_of(added.bundle, ["style", "style"]), wanted) < allowed
    assert relative_error(plain, wanted) > 0.3


def put_rounded(torch_model: Any, bundle: Bundle) -> None:
    """Give a torch model the weights that the MatMulNBits of a graph have: what they make of the identity."""
    import torch

    model = ir.load(bundle.path / "cpu-fp32.onnx")
    seen = 0
    for node in model.graph.all_nodes():
        if node.op_type != "MatMulNBits":
            continue
        rows, columns = (node.attributes[name].as_int() for name in "KN")
        matrix = product_of_identity(node, rows, columns)
        place = 0
        for one in origins_of(node, columns):
            module = torch_model.get_submodule(one.module)
            part = torch.from_numpy(matrix[:, place : place + one.columns].T.copy())
            module.weight.data[one.start : one.start + one.columns] = part
            place += one.columns
            seen += 1
    assert seen == 14


def product_of_identity(node: ir.Node, rows: int, columns: int) -> Any:
    given = [value for value in node.inputs[1:] if value is not None]
    copy = ir.to_proto(node)
    copy.input[0] = "x"
    graph = helper.make_graph(
        [copy],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, rows])],
        [helper.make_tensor_value_info(str(node.outputs[0].name), TensorProto.FLOAT, [rows, columns])],
        [ir.to_proto(value.const_value) for value in given if value.const_value is not None],
    )
    for attribute in copy.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 0
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(rows, dtype=np.float32)})[0]


def test_alpha_patterns(base: Path, tmp_path: Path):
    folder = write_lora(tmp_path / "lora", load_torch(base / "source"), ("q_proj", "v_proj"), rank=4)
    plain = {module.entry.path: module.b for module in read_lora(folder).modules}
    change_config(folder, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 16, "v_proj": 2})
    factors = {path: 2.0 if "0.self_attn.q" in path else 4.0 if "q_proj" in path else 0.5 for path in plain}
    for module in read_lora(folder).modules:
        np.testing.assert_allclose(module.b, plain[module.entry.path] * factors[module.entry.path] / 2.0, rtol=1e-6)


# what stays as it was -----------------------------------------------------------------------------------------------


def test_taking_the_last_adapter_out_gives_back_the_bundle(place: Path):
    before = open_bundle(place / "bundle")
    added = add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    assert added.bundle.digest != before.digest
    assert open_bundle(place / "bundle").digest == added.bundle.digest
    kept = {entry.path: entry for entry in added.bundle.manifest.files}
    assert all(kept[entry.path] == entry for entry in before.manifest.files)
    assert set(kept) - {entry.path for entry in before.manifest.files} == {
        "adapters/style.bin",
        "cpu-fp32.adapters.onnx",
    }
    assert remove_adapter(place / "bundle", "style") == open_bundle(place / "bundle")
    assert open_bundle(place / "bundle").digest == before.digest
    assert not (place / "bundle" / "adapters").exists()


def test_an_adapter_takes_the_place_of_another_and_old_files_are_not_written_to(place: Path, base: Path):
    add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    old = (place / "bundle/adapters/style.bin").read_bytes()
    os.link(place / "bundle/adapters/style.bin", place / "kept")
    with pytest.raises(UsageError, match="has an adapter style already"):
        add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    write_lora(place / "other", load_torch(base / "source"), seed=5)
    add_adapter(place / "bundle", place / "other", "style", replace_it=True)
    assert (place / "kept").read_bytes() == old != (place / "bundle/adapters/style.bin").read_bytes()
    assert len(open_bundle(place / "bundle").manifest.adapters or ()) == 1


def test_what_is_made_shares_no_file_with_the_bundle_that_it_replaces(place: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime refuses weights of a branch in a file of two names, and what is made runs beside the old."""
    from compiler.adapters import bundled

    names: list[int] = []
    judge = bundled.agreement

    def watched(staged: Bundle, *args: Any) -> Any:
        names.extend(path.stat().st_nlink for path in staged.path.rglob("*") if path.is_file())
        return judge(staged, *args)

    monkeypatch.setattr(bundled, "agreement", watched)
    add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    assert len(names) > 5
    assert set(names) == {1}


def test_an_adapter_of_which_nothing_fits_leaves_the_bundle_as_it_was(place: Path):
    before = open_bundle(place / "bundle").digest
    tensors = load_file(place / "lora/adapter_model.safetensors")
    save_file({name: array * np.float32(1e30) for name, array in tensors.items()}, _weights(place))
    with pytest.raises(FidelityError, match="not finite"):
        add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    assert open_bundle(place / "bundle").digest == before
    assert sorted(path.name for path in place.iterdir()) == ["bundle", "lora"]


def _weights(place: Path) -> Path:
    return place / "lora/adapter_model.safetensors"


# what is refused ----------------------------------------------------------------------------------------------------

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "is no LoRA adapter: its peft_type is 'IA3'"),
    ({"use_dora": True}, "DoRA"),
    ({"bias": "all"}, "biases"),
    ({"lora_bias": True}, "B has biases"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "changes embeddings"),
    ({"layer_replication": [[0, 2]]}, "repeats layers"),
    ({"init_lora_weights": "pissa_niter_4"}, "changing the base"),
    ({"lora_alpha": "much"}, "lora_alpha"),
    ({"base_model_name_or_path": "other/model"}, "trained on other/model, and the bundle is of source"),
]


@pytest.mark.parametrize(("values", "match"), CONFIGS)
def test_what_is_more_than_lora_is_refused(place: Path, values: dict[str, Any], match: str):
    change_config(place / "lora", **values)
    with pytest.raises(SourceError, match=match):
        add_adapter(place / "bundle", place / "lora", "style")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Any]


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): array for name, array in tensors.items()}


TENSORS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (lambda t: {**t, f"{FIRST}.lora_magnitude_vector": np.ones(2, np.float32)}, "no A or B of a linear layer"),
    (lambda t: {**t, "model.embed_tokens.lora_embedding_A": np.ones((2, 2), np.float32)}, "changes embeddings"),
    (lambda t: {name: a for name, a in t.items() if name != f"{FIRST}.lora_A.weight"}, "lacks A of model.layers.0"),
    (lambda t: {**t, f"{FIRST}.lora_A.weight": np.ones((3, 32), np.float32)}, "A of .* is 3 x 32 and B 32 x 4"),
    (lambda t: {**t, f"{FIRST}.lora_A.weight": np.ones(32, np.float32)}, "no float matrix"),
    (lambda t: {**t, f"{FIRST}.lora_A.weight": np.ones((4, 32), np.int8)}, "no float matrix"),
    (lambda t: {**t, f"{FIRST}.lora_A.weight": np.full((4, 32), np.nan, np.float32)}, "not finite"),
    (lambda t: {**t, f"{FIRST}.lora_A.weight": np.ones((4, 31), np.float32)}, "of 31 x 32, .* it is 32 x 32"),
    (lambda t: renamed(t, "layers.1.", "layers.7."), "layers.7.*no product of its own"),
    (lambda t: renamed(t, "q_proj", "w_q"), "w_q, of which cpu-fp32 has no product of its own"),
    (lambda t: {name: np.zeros((0, 0), np.float32) for name in t}, "is 0 x 0"),
]


@pytest.mark.parametrize(("change", "match"), TENSORS)
def test_tensors_that_do_not_fit_are_refused(place: Path, change: Callable[[Tensors], Tensors], match: str):
    save_file(change(load_file(_weights(place))), _weights(place))
    before = open_bundle(place / "bundle").digest
    with pytest.raises(SourceError, match=match):
        add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    assert open_bundle(place / "bundle").digest == before


def test_files_that_are_not_whole_are_refused(place: Path):
    def refused(match: str) -> None:
        with pytest.raises(SourceError, match=match):
            add_adapter(place / "bundle", place / "lora", "style", any_base=True)

    data = _weights(place).read_bytes()
    for part, match in ((data[:-1], "truncated"), (b"", "is empty"), (b"no", "not a safetensors")):
        _weights(place).write_bytes(part)
        refused(match)
    _weights(place).rename(place / "lora/adapter_model.bin")
    refused("holds adapter_model.bin, a pickle")
    (place / "lora/adapter_config.json").write_text("[]")
    refused("no JSON object")
    (place / "lora/adapter_config.json").unlink()
    refused("is missing")


@pytest.mark.parametrize("name", ["", "Style", "a b", "../x", "con", "x" * 65])
def test_names_that_cannot_be_used_are_refused(place: Path, name: str):
    with pytest.raises(UsageError, match="cannot be used"):
        add_adapter(place / "bundle", place / "lora", name)


def test_other_refusals(place: Path, base: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"has no adapter 'style'\. It has none"):
        remove_adapter(place / "bundle", "style")
    write_decoder(tmp_path / "other", seed=3)
    with pytest.raises(UsageError, match="is not the model that the bundle was made of"):
        add_adapter(place / "bundle", place / "lora", "style", against=str(tmp_path / "other"))
    for change, match in (
        ({"providers": ["CUDAExecutionProvider"]}, "run on the CPU provider only"),
        ({"pipeline": "clean; awq"}, "awq scaled what goes into"),
    ):
        bundle = rewritten(base / "bundle", tmp_path / match[:4].strip(), change)
        with pytest.raises(UnsupportedError, match=match):
            add_adapter(bundle, place / "lora", "style", any_base=True)


def rewritten(bundle: Path, out: Path, change: dict[str, Any]) -> Path:
    """A copy of a bundle whose variant says something else."""
    opened = open_bundle(bundle)
    document = json.loads(opened.manifest.to_json())
    document["variants"][0] |= change
    with BundleWriter(out) as writer:
        for entry in opened.manifest.files:
            writer.add_file(entry.path, bundle / entry.path)
        writer.commit(Manifest.parse(json.dumps(document).encode()), Proof("", (), ()))
    return out


def test_a_bundle_that_is_no_language_model_is_refused(tmp_path: Path):
    from bundle_builders import write_bundle as write_classifier

    write_classifier(tmp_path / "bundle")
    with pytest.raises(HastenError, match="Adapters are for language models"):
        add_adapter(tmp_path / "bundle", tmp_path / "lora", "style")


def test_the_graph_of_a_bundle_is_well_formed(place: Path):
    add_adapter(place / "bundle", place / "lora", "style", any_base=True)
    model = onnx.load(place / "bundle/cpu-fp32.adapters.onnx")
    names = [value.name for value in model.graph.input if value.name.startswith("adapters.")]
    assert names == [f"adapters.{index}.{part}" for index in range(8) for part in ("a", "b", "rows")]
    plain = onnx.load(place / "bundle/cpu-fp32.onnx")
    assert [value.name for value in plain.graph.output] == [value.name for value in model.graph.output]
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    inference = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    assert len(inference.graph.node) == len(plain.graph.node) + 4 * 8


def test_each_variant_that_can_takes_adapters(place: Path, base: Path, tmp_path: Path):
    opened = open_bundle(base / "bundle")
    document = json.loads(opened.manifest.to_json())
    for identity, change in (("cpu-b", {}), ("cpu-c", {"pipeline": "smooth(alpha=0.5); finish"})):
        variant = {**document["variants"][0], "id": identity, "model": f"{identity}.onnx", **change}
        document["variants"].append(variant)
        document["files"].append({"path": f"{identity}.onnx", "size": 1, "sha256": "0" * 64})
    with BundleWriter(tmp_path / "several") as writer:
        for entry in opened.manifest.files:
            writer.add_file(entry.path, base / "bundle" / entry.path)
        for identity in ("cpu-b", "cpu-c"):
            writer.add_file(f"{identity}.onnx", base / "bundle/cpu-fp32.onnx")
        writer.commit(Manifest.parse(json.dumps(document).encode()), Proof("", (), ()))
    added = add_adapter(tmp_path / "several", place / "lora", "style", any_base=True)
    taking = [variant.id for variant in added.bundle.manifest.variants if variant.adapted is not None]
    assert taking == ["cpu-fp32", "cpu-b"]
    assert added.notes == ("cpu-c takes no adapters: smooth scaled what goes into its products",)
    with load(tmp_path / "several", variant="cpu-c", cache=False) as model:
        assert model.generate("x", max_new_tokens=2).tokens
        with pytest.raises(UsageError, match="cpu-c takes no adapters here"):
            model.generate("x", max_new_tokens=2, adapter="style")
