"""``pipeline(task, model=OUT)`` as transformers has it, over a bundle."""

from __future__ import annotations

from artifacts.errors import UsageError

from .answering import QuestionAnswering
from .calls import Pipeline
from .features import FeatureExtraction
from .filling import FillMask
from .labels import TextClassification
from .source import Source, refuse
from .tagging import TokenClassification
from .writing import TextGeneration

PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind
    for kind in (
        TextClassification,
        TokenClassification,
        QuestionAnswering,
        FillMask,
        FeatureExtraction,
        TextGeneration,
    )
}
"""The class of each task."""
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
"""Other names that transformers has for them."""
REFUSED = (
    *("config", "tokenizer", "feature_extractor", "image_processor", "processor", "framework", "revision", "use_fast"),
    *("token", "device_map", "dtype", "torch_dtype", "trust_remote_code", "model_kwargs", "pipeline_class"),
)
"""Arguments of transformers' ``pipeline`` that hasten's does not take."""


def pipeline(task: str | None = None, model: object = None, *, device: object = None, **options: object) -> Pipeline:
    """A callable with the arguments and results of transformers' pipeline of that task.

    Args:
        task: ``text-classification`` (``sentiment-analysis``), ``token-classification`` (``ner``),
            ``question-answering``, ``fill-mask``, ``feature-extraction`` or ``text-generation``; None: the bundle's.
        model: Folder of a bundle, a loaded model, or a blocking engine.
        device: ``cpu``, ``cuda:0``, or as transformers: -1, 0 …; None: the fastest.
        options: Options of the calls, for all of them. What else transformers takes here is refused: the bundle holds
            its tokenizer, and its weights are what they are.

    Raises:
        UsageError: There is no such task or option, or the bundle is of another task.
        BundleError: Not a bundle, or a damaged one.
        ProviderError: Nothing here runs it correctly.
    """
    refuse("transformers.pipeline", {name: options.pop(name, None) for name in REFUSED})
    if model is None:
        raise UsageError("no model was named", "Pass model=, the folder of a bundle")
    name = ALIASES.get(task, task) if task is not None else ""
    if name and name not in PIPELINES:
        raise UsageError(f"hasten has no pipeline {task!r}", f"It has {', '.join((*PIPELINES, *ALIASES))}")
    source = Source(model, device=device, task=name)
    try:
        return _made(source, options)
    except BaseException:
        source.close()
        raise


def _made(source: Source, options: dict[str, object]) -> Pipeline:
    source.check_blocking()
    kind = PIPELINES.get(source.bundle.manifest.task)
    if kind is None:
        raise UsageError("a bundle of plain tensors has no pipeline", "Use hasten.load(OUT).run(feeds)")
    return kind(source, options)
