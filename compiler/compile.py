"""The whole compile on one screen: source, export, evidence, search, proof, bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path

from artifacts.bundle import Bundle, BundleWriter
from artifacts.constraints import printable
from artifacts.errors import ProviderError, UnsupportedError, UsageError
from artifacts.manifest import Manifest, Source, Variant
from artifacts.proof import Proof
from artifacts.signature import STEP_INPUTS
from artifacts.target import CPU, CPU_PROVIDER, CUDA, TARGETS, Target
from runtimes.bench import REFERENCE
from runtimes.providers import Probe, probe

from .calibrate import Calibrator
from .compression import Compression
from .data import Dataset, read_data
from .evidence import CALIBRATION_MEMORY, CALIBRATION_ROWS, Evidence, gather
from .export import Exported, export_model
from .export.exported import tensor_specs
from .graphs import GraphFolder
from .plan import Plan, load_plan
from .recipe import Recipe, load_recipe
from .report import render
from .source import ModelSource, read_source
from .tasks import GENERATION, TENSORS
from .tensor_data import TensorData, read_tensor_data
from .variant import BuiltVariant, Workshop
from .vocabulary import Trimmed, read_vocabulary, trim

Announce = Callable[[str, float], None]
_DECODING = (CPU, CUDA)
_TOOLS = ("hasten", "numpy", "onnx", "onnx-ir", "onnxscript", "optimum", "tokenizers", "torch", "transformers")


@dataclass
class _Progress:
    """Tells what goes on, and keeps how far the compile is, for what knows its own share only."""

    announce: Announce
    share: float = 0.0

    def __call__(self, text: str, share: float) -> None:
        self.share = share
        self.announce(text, share)

    def within(self, text: str, share: float) -> None:
        self.announce(f"{text} {share:.0%}", self.share)


@dataclass(frozen=True)
class CompileOptions:
    """Everything a user may say about a compile; the meanings are those of ``hasten compile --help``."""

    targets: tuple[str, ...] = ("cpu",)
    recipe: str = "balanced"
    task: str | None = None
    pooling: str | None = None
    name: str | None = None
    data: Path | None = None
    columns: str | None = None
    max_drop: float | None = None
    seed: int = 0
    threads: int | None = None
    calibration_rows: int = CALIBRATION_ROWS
    calibration_memory: int = CALIBRATION_MEMORY
    plan: Path | None = None
    unproven: bool = False
    keep_reference: bool = False
    force: bool = False
    vocabulary: Path | None = None
    compression: Compression = field(default_factory=Compression)


@dataclass(frozen=True)
class Compiled:
    """What a compile made.

    Attributes:
        bundle: The bundle, opened.
        notes: What the user should know besides: targets that are missing, attention that could not be fused.
    """

    bundle: Bundle
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, object]:
        """As JSON, for machines."""
        return {
            "bundle": str(self.bundle.path),
            "digest": self.bundle.digest,
            "notes": list(self.notes),
            "manifest": json.loads(self.bundle.manifest.to_json()),
            "proof": json.loads(self.bundle.proof.to_json())["payload"],
        }


def compile_model(source: str | Path, output: str | Path, **options: object) -> Bundle:
    """Compile a model into a bundle.

    Args:
        source: A Hugging Face folder, a hub id or an .onnx file.
        output: Folder of the bundle.
        options: The fields of ``CompileOptions`` and of ``Compression``.

    Raises:
        HastenError: Whatever keeps the bundle from being made; nothing half-written is left behind.
    """
    paths = {
        name: Path(value) for name in ("data", "plan", "vocabulary") if isinstance(value := options.get(name), str)
    }
    wishes = {name.name: options.pop(name.name) for name in fields(Compression) if name.name in options}
    options["compression"] = Compression(**wishes)  # type: ignore[arg-type]  # as below
    request = CompileOptions(**{**options, **paths})  # type: ignore[arg-type]  # the dataclass names a wrong option
    return compile_model_with(str(source), Path(output), request).bundle


def compile_model_with(
    source: str, output: Path, options: CompileOptions, announce: Announce = lambda text, share: None
) -> Compiled:
    """The same with the options as a value, and with progress: ``announce(what begins, share of the work done)``."""
    progress = _Progress(announce)
    recipe = load_recipe(options.recipe)
    plan, options = _planned(options)
    wish = options.compression.pipeline()
    targets = _targets(options.targets) if plan is None else tuple(Target.parse(one.target) for one in plan.variants)
    probes = _probed(targets, unproven=options.unproven)
    with BundleWriter(output, force=options.force) as writer:
        progress("reading the source", 0.0)
        found = _found(source, plan, options)
        targets = _able(targets, recipe, options, found.task)
        data = _data(options, found.task)
        progress("exporting", 0.02)
        trimmed = _trimmed(found, options, plan)
        exported = trimmed.exported
        for path, content in exported.files.items():
            writer.add_bytes(path, content)
        progress("running the original model", 0.25)
        evidence = gather(
            found,
            exported,
            data,
            writer.staging,
            seed=options.seed,
            max_drop=options.max_drop,
            calibration_rows=options.calibration_rows,
        )
        folder = GraphFolder(writer.staging)
        exported = _settle(exported, folder)
        reproducer = output.with_name(f"{output.name}-reproducer")
        calibrator = Calibrator(
            evidence.calibration,
            folder,
            memory=options.calibration_memory,
            seed=options.seed,
            threads=options.threads or 0,
            announce=progress.within,
        )
        workshop = Workshop(
            evidence,
            calibrator.observe,
            folder,
            options.threads or 0,
            reproducer,
            progress,
            exported.model,
            probes,
            calibrator.moments,
            wish,
        )
        if plan is not None and plan.calibration and plan.calibration != calibrator.digest(exported.model):
            raise UsageError("the plan was calibrated on other data", "Pass the same --data, or compile without --plan")
        variants = _variants(workshop, recipe, plan, targets, options)
        trimmed = replace(trimmed, exported=exported)
        bundle = _write(writer, found, trimmed, evidence, variants, options, calibrator.used)
    return Compiled(bundle, _notes(trimmed, evidence, variants))


def _planned(options: CompileOptions) -> tuple[Plan | None, CompileOptions]:
    """The plan, if there is one, and the options with what it says."""
    if options.plan is None:
        return None, options
    plan = load_plan(options.plan)
    if options.compression:
        raise UsageError("a plan says itself what is taken out of a model", "Give --plan or compression, not both")
    pooling = options.pooling or plan.pooling or None
    return plan, replace(options, seed=plan.seed, pooling=pooling, calibration_rows=plan.calibration_rows)


def _trimmed(found: ModelSource, options: CompileOptions, plan: Plan | None) -> Trimmed:
    """The exported model, with the tokens that the user keeps."""
    vocabulary = read_vocabulary(options.vocabulary, found) if options.vocabulary is not None else None
    trimmed = trim(found, export_model(found, seed=options.seed), vocabulary)
    if plan is not None and plan.vocabulary != trimmed.digest:
        raise UsageError(
            "the plan was made with another vocabulary", "Pass the same --vocabulary, or compile without --plan"
        )
    return trimmed


def _found(source: str, plan: Plan | None, options: CompileOptions) -> ModelSource:
    """The source, under a name that a manifest can hold, and of the plan's task and content where there is a plan."""
    if options.name is not None and not _is_name(options.name):
        raise UsageError(f"the name {options.name[:40]!r} cannot be used", "Pass at most 256 printable characters")
    planned = plan.task if plan is not None and plan.task != TENSORS else None
    found = read_source(source, options.task or planned, pooling=options.pooling)
    if plan is not None and plan.source != found.digest:
        raise UsageError(f"the plan was made for another model ({plan.source[:19]})", "Compile without --plan")
    if plan is not None and plan.task != found.task:
        raise UsageError(f"the plan was made for {plan.task}, and this is {found.task}", "Compile without --plan")
    return found if _is_name(found.name) else replace(found, name=printable(found.name)[:256] or "model")


def _data(options: CompileOptions, task: str) -> Dataset | TensorData | None:
    if options.max_drop is not None and options.max_drop >= 1.0 and task != GENERATION:
        what = f"--max-drop {options.max_drop:.0%} leaves nothing of a model for {task}"
        raise UsageError(what, "Give less than 100%: only the perplexity of a decoder can more than double")
    if task == TENSORS:
        if options.compression and options.data is None:
            raise UsageError("compression of plain tensors is fitted to examples", "Give them with --data FILE.npz")
        return read_tensor_data(options.data, options.columns) if options.data is not None else None
    return read_data(options.data, options.columns, task)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 256 and printable(text) == text


def _settle(exported: Exported, folder: GraphFolder) -> Exported:
    """Move the weights to disk and let go of the original model: from here on, memory holds a graph without weights."""
    folder.save(exported.model)
    return replace(exported, reference=None)


def _variants(
    workshop: Workshop, recipe: Recipe, plan: Plan | None, targets: tuple[Target, ...], options: CompileOptions
) -> tuple[BuiltVariant, ...]:
    if plan is not None:
        built = [workshop.replay(planned) for planned in plan.variants]
    else:
        span = 0.65 / len(targets)
        built = [
            workshop.build(target, recipe, start=0.3 + index * span, span=span) for index, target in enumerate(targets)
        ]
    if options.keep_reference and all(variant.planned.id != REFERENCE for variant in built):
        built.append(workshop.reference())
    return tuple(built)


def _targets(names: tuple[str, ...]) -> tuple[Target, ...]:
    if not names:
        raise UsageError("there is no target to compile for", f"Give one of {', '.join(t.name for t in TARGETS)}")
    chosen: list[Target] = []
    for name in names:
        if name == "auto":
            chosen += [target for target in TARGETS if probe(target.provider).ok]
        else:
            chosen.append(Target.parse(name))
    return tuple(dict.fromkeys(chosen))


def _able(targets: tuple[Target, ...], recipe: Recipe, options: CompileOptions, task: str) -> tuple[Target, ...]:
    """The targets that run models of the task; what ``auto`` found and does not is left out.

    Raises:
        UnsupportedError: One that was asked for does not.
        UsageError: The recipe is not for the task.
    """
    unable = [target for target in targets if task == GENERATION and target not in _DECODING]
    named = [target.name for target in unable if target.name in options.targets or options.plan is not None]
    if named:
        raise UnsupportedError(
            f"the target {named[0]} does not run decoders: its provider has no GroupQueryAttention",
            f"Compile for {' or '.join(target.name for target in _DECODING)}",
        )
    able = tuple(target for target in targets if target not in unable)
    for target in able if options.plan is None else ():
        recipe.stages_for(target, task)
    return able


def _probed(targets: tuple[Target, ...], *, unproven: bool) -> dict[str, Probe]:
    """What the targets' providers answer here, by provider; they must all work, or be allowed not to."""
    providers = dict.fromkeys(target.provider for target in targets if target.provider != CPU_PROVIDER)
    probes = {provider: probe(provider) for provider in providers}
    for target in targets:
        found = probes.get(target.provider)
        if found is not None and not found.ok and not unproven:
            raise ProviderError(
                f"the target {target.name} does not work here: {found.reason}",
                "Install its provider; or pass --unproven to compile without running there and prove it later",
            )
    return probes


def _write(
    writer: BundleWriter,
    found: ModelSource,
    trimmed: Trimmed,
    evidence: Evidence,
    variants: tuple[BuiltVariant, ...],
    options: CompileOptions,
    calibration: str,
) -> Bundle:
    exported = trimmed.exported
    for variant in variants:
        writer.add_file(f"{variant.planned.id}.onnx", variant.candidate.graph.path)
    for trial in writer.staging.glob("trial-*.onnx"):
        trial.unlink()
    plan = Plan(
        source=found.digest,
        task=found.task,
        pooling=options.pooling or "",
        seed=options.seed,
        calibration=calibration,
        calibration_rows=options.calibration_rows,
        vocabulary=trimmed.digest,
        variants=tuple(variant.planned for variant in variants),
    )
    writer.add_bytes("plan.toml", plan.to_toml())
    writer.add_bytes("golden.npz", evidence.golden_bytes())
    manifest = Manifest(
        name=options.name or found.name,
        task=found.task,
        source=Source(found.name, found.kind, found.digest, found.architecture),
        toolchain=_toolchain(),
        inputs=exported.inputs,
        outputs=exported.outputs,
        processor=exported.processor,
        variants=tuple(_listed(variant, exported) for variant in variants),
        files=(),
        generation=exported.generation,
    )
    proofs = tuple(variant.proof for variant in variants)
    writer.add_bytes("report.html", render(manifest, proofs).encode())
    return writer.commit(manifest, Proof("", proofs, ()), ("report.html",))


def _listed(variant: BuiltVariant, exported: Exported) -> Variant:
    """How the manifest lists a variant; with the inputs of its KV cache, where a pass altered that."""
    inputs = tensor_specs(tuple(variant.candidate.model.graph.inputs))
    own = exported.generation is not None and inputs != exported.inputs
    return replace(variant.manifest_entry(), cache=inputs[len(STEP_INPUTS) :] if own else None)


def _toolchain() -> tuple[tuple[str, str], ...]:
    return tuple((name, metadata.version(name)) for name in _TOOLS)


def _notes(trimmed: Trimmed, evidence: Evidence, variants: tuple[BuiltVariant, ...]) -> tuple[str, ...]:
    exported = trimmed.exported
    notes = [trimmed.note, *evidence.notes] if trimmed.note else list(evidence.notes)
    if exported.attentions_expected and exported.attentions_emitted < exported.attentions_expected:
        notes.append(f"attention is not fused: {exported.attention_refusal}")
    notes += [
        f"{variant.planned.id} is unproven: run `hasten prove` on the target machine"
        for variant in variants
        if variant.proof.status == "unproven"
    ]
    return tuple(notes)
