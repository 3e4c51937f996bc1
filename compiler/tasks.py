"""The tasks hasten compiles, and which of them an architecture serves."""

from __future__ import annotations

from collections.abc import Mapping

from artifacts.errors import InstallationError, UnsupportedError
from artifacts.manifest import TASKS as BUNDLE_TASKS

from .decoders import is_language_model
from .quiet import quiet

TENSORS = "tensors"
GENERATION = "text-generation"
TASKS = tuple(task for task in BUNDLE_TASKS if task != TENSORS)
"""Tasks that take text, and that a model's architecture is inferred to serve."""
EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity")


def serves(architecture: str, wanted: str | None) -> str:
    """The task to compile the architecture for.

    Raises:
        UnsupportedError: The architecture is unknown, or serves another task.
    """
    natural = infer_task(architecture)
    if wanted in EMBEDDING_TASKS:
        return "feature-extraction"  # any encoder has token vectors below its head
    if wanted is None:
        if natural not in TASKS:
            what = f"serves {natural}" if natural else "serves no task that could be inferred"
            raise UnsupportedError(f"architecture {architecture} {what}", f"Compiled are {', '.join(TASKS)}")
        return natural
    if natural and natural != wanted:
        raise UnsupportedError(
            f"architecture {architecture} serves {natural}, not {wanted}: the weights of that head would be random",
            "Pass a model that was trained for the task, or leave --task out",
        )
    return wanted


def refusal(task: str, architecture: str, config: Mapping[str, object]) -> str:
    """Why a model whose class serves the task is not compiled for it; empty if it is. Decoders: `compiler.decoders`."""
    if task == "fill-mask" and config.get("is_encoder_decoder") is True:
        return f"{architecture} is an encoder-decoder: it writes texts, and fills no masks"
    return ""


def infer_task(architecture: str) -> str:
    """The task of a transformers class; empty where it cannot be told.

    Raises:
        UnsupportedError: transformers has no such class.
        InstallationError: The ``compile`` extra is not installed.
    """
    with quiet():
        try:
            import transformers
            from optimum.exporters.tasks import TasksManager
        except ImportError as error:
            raise InstallationError(f"{error.name} is not installed", "pip install 'hasten[compile]'") from error
        model_class = getattr(transformers, architecture, None)
        if not isinstance(model_class, type):
            raise UnsupportedError(
                f"transformers {transformers.__version__} has no architecture {architecture}",
                "Models with code of their own are not compiled; export to ONNX first and pass the .onnx file",
            )
        if is_language_model(architecture):
            return GENERATION
        try:
            return str(TasksManager.infer_task_from_model(model_class))
        except ValueError:
            return ""
