"""manifest.json: what a bundle is, its variants, and every content file with its size and hash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from .adapters import AdaptedGraph, Adapter, check_adapters
from .constraints import (
    MAX_INTEGER,
    Between,
    BundlePath,
    Count,
    Matches,
    OneOf,
    PathOrNone,
    Sha256,
    path_problem,
    shown,
)
from .signature import STEP_INPUTS, cache_problem, decoder_problem
from .strict import At, Omitted, check_schema, decode, encode_document, read_json, require_unique

MANIFEST_NAME = "manifest.json"
PROOF_NAME = "proof.json"
TASKS = (
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "tensors",
)
"""Tasks of a bundle. All but ``tensors`` take text, and have a processor."""
PROBLEMS = ("", "single_label_classification", "multi_label_classification", "regression")
OPTIMIZATION_LEVELS = ("disabled", "basic", "extended", "all")
COMPUTE_PRECISIONS = ("", "fp32", "bf16", "fp16")
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16"),
)
WEIGHTS = re.compile(r"weights/([0-9a-f]{64})\.bin")
"""Path of a weights file; the group is the hash of its content."""

_MAX_FILE = 1 << 44
_ROLE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_VARIANTS = 256

Name = Annotated[str, Matches(r".{1,256}")]
Word = Annotated[str, Matches(r"[a-z0-9][a-z0-9._-]{0,63}")]
Provider = Annotated[str, Matches(r"[A-Za-z0-9]{1,64}ExecutionProvider")]
Digest = Annotated[str, Matches(r"sha256:[0-9a-f]{64}")]


@dataclass(frozen=True)
class Dimension:
    """An extent of a tensor: a number, or the name of one that is known when it runs."""

    def problem(self, value: int | str) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        if isinstance(value, int):
            return "" if 0 <= value < 1 << 40 else f"{value} is no extent"
        return "" if 0 < len(value) <= 256 else "a dimension's name has 1 to 256 characters"


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle.

    Attributes:
        path: Where it lies in the bundle, parts joined with ``/``.
        size: Bytes.
        sha256: Hash of its content, 64 hexadecimal digits.
    """

    path: BundlePath
    size: Annotated[int, Between(0, _MAX_FILE)]
    sha256: Sha256


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graphs.

    Attributes:
        name: Name in the graph.
        dtype: Name of the numpy dtype, such as ``int64``.
        shape: Extents; strings are dynamic.
    """

    name: Name
    dtype: Annotated[str, OneOf(DTYPES)]
    shape: tuple[Annotated[int | str, Dimension()], ...]


@dataclass(frozen=True)
class SessionOptions:
    """How ONNX Runtime is to load a graph; what it does at load was part of what was measured.

    Attributes:
        optimization_level: ONNX Runtime's graph optimization level: ``disabled``, ``basic``, ``extended`` or ``all``.
        disabled_optimizers: Names of its optimizers that stay off.
        precision: What the provider may compute a float32 graph in; empty: as it likes.
    """

    optimization_level: Annotated[str, OneOf(OPTIMIZATION_LEVELS)] = "all"
    disabled_optimizers: tuple[Annotated[str, Matches(r"[A-Za-z0-9_]{1,128}")], ...] = ()
    precision: Annotated[str, OneOf(COMPUTE_PRECISIONS)] = ""


@dataclass(frozen=True)
class Variant:
    """One compiled form of the model.

    Attributes:
        id: Unique in the bundle.
        target: Name of the target that it was compiled for.
        providers: Execution providers, in order of preference.
        model: Path of the graph, always ``<id>.onnx``.
        precision: What most of its weights are: ``fp32``, ``fp16``, ``int8`` ….
        pipeline: Text form of the passes that made it.
        session: How to load it.
        tolerance: Relative L2 error on the golden outputs below which a provider runs it correctly.
        weights: Paths of the weights files that the graph refers to.
        cache: Inputs of its KV cache, where they are not those of the manifest; absent where they are.
        adapted: Its graph as it takes adapters; absent where the bundle has none, or this variant takes none.
    """

    id: Word
    target: Word
    providers: tuple[Provider, ...]
    model: BundlePath
    precision: Word
    pipeline: str
    session: SessionOptions
    tolerance: Annotated[float, Between(0.0, 1.0)]
    weights: tuple[BundlePath, ...]
    cache: Annotated[tuple[TensorSpec, ...] | None, Omitted()] = None
    adapted: Annotated[AdaptedGraph | None, Omitted()] = None


@dataclass(frozen=True)
class TextProcessor:
    """How texts become tensors, and scores become words.

    Attributes:
        tokenizer: Path of the tokenizer.
        max_length: Most tokens the model takes.
        pad_id: Token id of padding.
        pad_token: Text of the padding token.
        pad_type_id: Token type id of padding.
        pairs: Whether the graph takes token_type_ids.
        labels: Name of each class.
        mask_token: Text of the mask token; empty if the task has none.
        problem: Kind of classification; empty where it does not apply.
    """

    tokenizer: BundlePath
    max_length: Annotated[int, Between(1, 1 << 24)]
    pad_id: Count
    pad_token: str
    pad_type_id: Count
    pairs: bool
    labels: tuple[str, ...] = ()
    mask_token: str = ""
    problem: Annotated[str, OneOf(PROBLEMS)] = ""


@dataclass(frozen=True)
class Generation:
    """How a language model begins, ends and samples a text.

    Attributes:
        eos: Token ids that end a text; may be empty.
        bos: Token id that begins a text; -1: none. Whether it is put before a text is the tokenizer's business.
        chat_template: Path of the Jinja template that makes a prompt of messages; empty: there is none.
        special: Texts of special tokens for the template, by role (``eos_token``), sorted.
        temperature: The model's own default, as are those below; in [0, 100], 0 is greedy.
        top_k: Likeliest tokens that may be sampled; 0: all.
        top_p: Probability that the tokens sampled from add up to.
        min_p: Least probability of a token sampled, as a share of the likeliest one's.
        repetition_penalty: What the logits of tokens already in the text are divided by; in [0.01, 100].
        sample: Sample; otherwise the likeliest token is taken.
    """

    eos: tuple[Count, ...]
    bos: Annotated[int, Between(-1, MAX_INTEGER)]
    chat_template: Annotated[str, PathOrNone()]
    special: tuple[tuple[str, str], ...]
    temperature: Annotated[float, Between(0.0, 100.0)] = 1.0
    top_k: Annotated[int, Between(0, 1 << 24)] = 0
    top_p: Annotated[float, Between(0.0, 1.0)] = 1.0
    min_p: Annotated[float, Between(0.0, 1.0)] = 0.0
    repetition_penalty: Annotated[float, Between(0.01, 100.0)] = 1.0
    sample: bool = False


@dataclass(frozen=True)
class Source:
    """Where the model came from.

    Attributes:
        name: What the user called it.
        kind: ``huggingface`` or ``onnx``.
        digest: Hash of its files, ``sha256:…``.
        architecture: Class of the model, or empty.
    """

    name: str
    kind: Annotated[str, OneOf(("huggingface", "onnx"))]
    digest: Digest
    architecture: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle is. Its bytes are the identity of the bundle.

    Attributes:
        name: What to call the bundle.
        task: One of `TASKS`.
        source: Where the model came from.
        toolchain: Versions of what made it, sorted by name.
        inputs: Inputs, equal in all variants but for a KV cache; see `inputs_of`.
        outputs: Outputs, likewise.
        processor: How texts become tensors; absent for plain tensors.
        variants: At least one.
        files: Every content file but manifest.json itself.
        generation: How texts are generated; absent for every task but text-generation.
        adapters: LoRA adapters that a call may name; absent where there are none.
    """

    name: Name
    task: Annotated[str, OneOf(TASKS)]
    source: Source
    toolchain: tuple[tuple[str, str], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    processor: TextProcessor | None
    variants: tuple[Variant, ...]
    files: tuple[FileEntry, ...]
    generation: Annotated[Generation | None, Omitted()] = None
    adapters: Annotated[tuple[Adapter, ...] | None, Omitted()] = None

    def inputs_of(self, variant: Variant) -> tuple[TensorSpec, ...]:
        """Inputs of the graph of a variant: those of all, or with a KV cache of its own."""
        return self.inputs if variant.cache is None else (*self.inputs[: len(STEP_INPUTS)], *variant.cache)

    def to_json(self) -> bytes:
        """Canonical bytes of manifest.json: equal manifests give equal bytes."""
        return encode_document(self)

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The manifest that the bytes of a manifest.json hold.

        Raises:
            SchemaError: It breaks a MUST of docs/format.md; names the key.
        """
        at = At(MANIFEST_NAME)
        document = read_json(data, at)
        check_schema(document, at)
        del document["schema"]
        manifest = decode(cls, document, at)
        _check(manifest, at)
        return manifest


def check_files(files: tuple[FileEntry, ...], at: At, reserved: tuple[str, ...] = (MANIFEST_NAME, PROOF_NAME)) -> None:
    """Refuse a list of files that could not lie in one folder.

    Raises:
        SchemaError: Two paths are equal but for case, one is a reserved name, or one is the folder of another.
    """
    require_unique([entry.path.casefold() for entry in files], at, "the path")
    paths = {entry.path.casefold() for entry in files}
    for index, entry in enumerate(files):
        parts = entry.path.casefold().split("/")
        if parts[0] in reserved:
            raise at.item(index).error(f"{shown(entry.path)} is the name of another document")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in paths:
                raise at.item(index).error(
                    f"{shown('/'.join(parts[:end]))} is a file and the folder of {shown(entry.path)}"
                )


def _check(manifest: Manifest, at: At) -> None:
    check_files(manifest.files, at.field("files"))
    require_unique([spec.name for spec in manifest.inputs], at.field("inputs"), "the name")
    require_unique([spec.name for spec in manifest.outputs], at.field("outputs"), "the name")
    for name, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs), ("variants", manifest.variants)):
        if not specs:
            raise at.field(name).error("at least one is needed")
    if sum(entry.size for entry in manifest.files) > MAX_INTEGER:
        raise at.field("files").error("the sizes add up to too much")
    files = {entry.path: entry for entry in manifest.files}
    _check_variants(manifest, files, at.field("variants"))
    _check_caches(manifest, at.field("variants"))
    _check_weights(manifest, at.field("files"))
    if manifest.processor is None:
        if manifest.task != "tensors":
            raise at.field("processor").error(f"the task {manifest.task} needs one")
    elif manifest.processor.tokenizer not in files:
        here = at.field("processor").field("tokenizer")
        raise here.error(f"{shown(manifest.processor.tokenizer)} is not listed in files")
    _check_generation(manifest, files, at)
    if manifest.adapters is not None and (manifest.generation is None or not manifest.adapters):
        raise at.field("adapters").error("they are of the task text-generation, and left out where there are none")
    check_adapters(manifest.adapters or (), manifest.variants, files, at)


def _check_generation(manifest: Manifest, files: dict[str, FileEntry], at: At) -> None:
    generation = manifest.generation
    if (generation is not None) != (manifest.task == "text-generation"):
        needs = "needs one" if generation is None else "has none"
        raise at.field("generation").error(f"the task {manifest.task} {needs}")
    if generation is None:
        return
    if generation.chat_template and generation.chat_template not in files:
        here = at.field("generation").field("chat_template")
        raise here.error(f"{shown(generation.chat_template)} is not listed in files")
    for role, _ in generation.special:
        if not _ROLE.fullmatch(role):
            raise at.field("generation").field("special").error(f"{shown(role)} does not match {_ROLE.pattern}")
    if found := decoder_problem(manifest.inputs, manifest.outputs):
        raise at.field(found[0]).error(found[1])
    vocabulary = manifest.outputs[0].shape[2]
    for key, ids in (("eos", generation.eos), ("bos", (generation.bos,))):
        for token in ids:
            if isinstance(vocabulary, int) and token >= vocabulary:
                here = at.field("generation").field(key)
                raise here.error(f"{token} is outside a vocabulary of {vocabulary}")


def _check_variants(manifest: Manifest, files: dict[str, FileEntry], at: At) -> None:
    if len(manifest.variants) > _MAX_VARIANTS:
        raise at.error(f"{len(manifest.variants)} variants; {_MAX_VARIANTS} are allowed")
    require_unique([variant.id for variant in manifest.variants], at, "the id")
    for index, variant in enumerate(manifest.variants):
        here = at.item(index)
        if variant.model != f"{variant.id}.onnx":
            raise here.field("model").error(f"{shown(variant.model)} is not '{variant.id}.onnx'")
        if problem := path_problem(variant.model):
            raise here.field("id").error(problem)
        if variant.model not in files:
            raise here.field("model").error(f"{shown(variant.model)} is not listed in files")
        if not variant.providers:
            raise here.field("providers").error("at least one is needed")
        if len(set(variant.providers)) != len(variant.providers):
            raise here.field("providers").error("a provider stands twice")
        require_unique(variant.weights, here.field("weights"), "the path")
        for number, path in enumerate(variant.weights):
            if not WEIGHTS.fullmatch(path):
                raise here.field("weights").item(number).error(f"{shown(path)} is no weights/<sha256>.bin")
            if path not in files:
                raise here.field("weights").item(number).error(f"{shown(path)} is not listed in files")


def _check_caches(manifest: Manifest, at: At) -> None:
    for index, variant in enumerate(manifest.variants):
        if variant.cache is not None:
            here = at.item(index).field("cache")
            if manifest.task != "text-generation":
                raise here.error(f"the task {manifest.task} has no KV cache")
            if problem := cache_problem(variant.cache):
                raise here.error(problem)


def _check_weights(manifest: Manifest, at: At) -> None:
    used = {path for variant in manifest.variants for path in variant.weights}
    for index, entry in enumerate(manifest.files):
        if not entry.path.casefold().startswith("weights/"):
            continue
        match = WEIGHTS.fullmatch(entry.path)
        if match is None or match[1] != entry.sha256:
            raise at.item(index).error(f"{shown(entry.path)} is not named by its hash")
        if entry.path not in used:
            raise at.item(index).error(f"no variant refers to {shown(entry.path)}")
