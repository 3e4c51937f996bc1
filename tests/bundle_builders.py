"""Small bundles for the tests: two variants that share weights, a processor, golden data and evidence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import zstandard

from artifacts.bundle import Bundle, BundleWriter, WeightStore
from artifacts.digest import canonical_json, sha256_bytes
from artifacts.manifest import (
    FileEntry,
    Generation,
    Manifest,
    SessionOptions,
    Source,
    TensorSpec,
    TextProcessor,
    Variant,
)
from artifacts.proof import Fidelity, Machine, Proof, Speed, Step, VariantProof
from artifacts.signature import STEP_INPUTS, cache_names
from artifacts.ustar import header_of, padded

CPU = "CPUExecutionProvider"
EMPTY_DIGEST = f"sha256:{'0' * 64}"


def a_manifest(weights: tuple[str, ...] = ()) -> Manifest:
    """A manifest whose files are still to be filled in."""
    session = SessionOptions("all", ("SkipLayerNormFusion",), "fp32")
    return Manifest(
        name="tiny",
        task="text-classification",
        source=Source("org/tiny", "huggingface", f"sha256:{'1' * 64}", "BertForSequenceClassification"),
        toolchain=(("onnx-ir", "1.0"), ("torch", "2.11")),
        inputs=(TensorSpec("input_ids", "int64", ("batch", "length")),),
        outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
        processor=TextProcessor(
            "processor/tokenizer.json", 128, 0, "[PAD]", 0, pairs=True, labels=("schön", "ugly"), problem="regression"
        ),
        variants=(
            Variant("cpu-fp32", "cpu", (CPU,), "cpu-fp32.onnx", "fp32", "clean; fuse", session, 1e-4, weights),
            Variant("cpu-int8", "cpu", (CPU,), "cpu-int8.onnx", "int8", "clean", SessionOptions(), 0.05, weights[:1]),
        ),
        files=(),
    )


def decoder_specs(layers: int = 2, heads: int = 2, size: int = 8, vocabulary: int = 97, dtype: str = "float32"):
    """(inputs, outputs) of a decoder's graph."""
    shape = ("batch", heads, "capacity", size)
    pairs = [pair for layer in range(layers) for pair in cache_names(layer)]
    inputs = [TensorSpec(*one) for one in STEP_INPUTS] + [TensorSpec(old, dtype, shape) for old, _ in pairs]
    outputs = [TensorSpec("logits", "float32", ("batch", "positions", vocabulary))]
    return tuple(inputs), (*outputs, *(TensorSpec(new, dtype, shape) for _, new in pairs))


def a_decoder_manifest() -> Manifest:
    """A manifest of the task text-generation, its files listed."""
    inputs, outputs = decoder_specs()
    names = ("cpu-fp32.onnx", "processor/chat_template.jinja", "processor/tokenizer.json")
    return Manifest(
        name="tiny",
        task="text-generation",
        source=Source("org/tiny", "huggingface", f"sha256:{'1' * 64}", "LlamaForCausalLM"),
        toolchain=(),
        inputs=inputs,
        outputs=outputs,
        processor=TextProcessor("processor/tokenizer.json", 128, 0, "<pad>", 0, pairs=False),
        variants=(Variant("cpu-fp32", "cpu", (CPU,), "cpu-fp32.onnx", "fp32", "", SessionOptions(), 1e-4, ()),),
        files=tuple(FileEntry(name, 5, "c" * 64) for name in names),
        generation=Generation((2,), 1, "processor/chat_template.jinja", (("bos_token", "<s>"), ("eos_token", "</s>"))),
    )


def a_proof(error: float = 1e-6) -> Proof:
    """A proof whose bundle and files are still to be filled in."""
    machine = Machine("Some CPU", 2, 8.5, "Linux 6.1", "3.11.9", "1.31.0", ("NVIDIA H200",))
    step = Step("clean", 3, 0, kept=True, reason="smaller", size=10, ms=1.5, ratio=1.25, error=0.0)
    proven = VariantProof(
        variant="cpu-int8",
        status="proven",
        provider=CPU,
        machine=machine,
        golden_error=error,
        fidelity=(Fidelity("accuracy", 0.9, 0.91, 0.01, 0.02, 500, "dev.jsonl"),),
        speed=(Speed(16, 128, 40.0, 20.0, 2.0, 1.9, 2.1),),
        steps=(step,),
        size=1000,
        reason="",
    )
    return Proof(EMPTY_DIGEST, (proven,), ())


def stage(writer: BundleWriter, content: str, weight_bytes: int = 20_000) -> tuple[str, ...]:
    """Put the files of a bundle into a writer; the paths of its weights."""
    store = WeightStore(writer.staging / "weights")
    weights = tuple(store.put(f"{content}{index}".encode() * (weight_bytes // 4)).path for index in range(2))
    for variant in ("cpu-fp32", "cpu-int8"):
        writer.add_bytes(f"{variant}.onnx", f"graph {variant} {content}".encode())
    writer.add_bytes("processor/tokenizer.json", b'{"version": "1.0"}')
    writer.add_bytes("golden.npz", b"golden" * 100)
    writer.add_bytes("plan.toml", b"schema = 1\n")
    writer.add_bytes("report.html", b"<html>")
    return weights


def write_bundle(out: Path, content: str = "one", *, force: bool = False, weight_bytes: int = 20_000) -> Bundle:
    """A complete bundle at ``out``."""
    with BundleWriter(out, force=force) as writer:
        weights = stage(writer, content, weight_bytes)
        return writer.commit(a_manifest(weights), a_proof(), ("report.html",))


def names(folder: Path) -> list[str]:
    """Names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def leftovers(out: Path) -> list[str]:
    """Names beside ``out`` that writers should not have left."""
    return [name for name in names(out.parent) if ".hasten-" in name]


def tree(root: Path) -> dict[str, bytes]:
    """Every file under ``root`` with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def sealed(payload: Any) -> bytes:
    """The bytes of a proof.json with that payload, its hash right."""
    return canonical_json({"schema": 1, "sha256": sha256_bytes(canonical_json(payload)), "payload": payload})


def reseal(root: Path) -> None:
    """After manifest.json was altered: make proof.json speak of it, as an attacker would."""
    payload = json.loads((root / "proof.json").read_bytes())["payload"]
    payload["bundle"] = f"sha256:{sha256_bytes((root / 'manifest.json').read_bytes())}"
    (root / "proof.json").write_bytes(sealed(payload))


def entry_of(root: Path, path: str) -> dict[str, Any]:
    """What a manifest says of a file as it is now."""
    data = (root / path).read_bytes()
    return {"path": path, "size": len(data), "sha256": sha256_bytes(data)}


def members_of(bundle: Bundle) -> list[tuple[str, bytes]]:
    """The files of a packed bundle in their order."""
    listed: tuple[FileEntry, ...] = (*bundle.manifest.files, *bundle.proof.files)
    names = ["manifest.json", "proof.json", *sorted(entry.path for entry in listed)]
    return [(name, (bundle.path / name).read_bytes()) for name in names]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """The tar that holds these files, in the form of a packed bundle."""
    out = io.BytesIO()
    for name, data in members:
        out.write(header_of(name, len(data)) + data + bytes(padded(len(data)) - len(data)))
    return out.getvalue() + bytes(1024)


def compressed(tar: bytes) -> bytes:
    """One zstd frame that holds ``tar``."""
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(tar)
