"""`SentenceTransformer` as sentence-transformers has it, over a bundle."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError
from runtimes.closing import Closing

from .source import Source, count_of, import_torch, lead, refuse

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_LIBRARY = "sentence-transformers"


class SentenceTransformer(Closing):
    """A sentence encoder with the methods of sentence-transformers' class of this name (5 and 6).

    Pooling, and normalisation where the model has it, are in the compiled graph. Prompts are not: pass those of the
    model's config_sentence_transformers.json.
    """

    def __init__(
        self,
        model_name_or_path: object,
        *,
        device: object = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: Similarity = "cosine",
        truncate_dim: int | None = None,
        **others: object,
    ) -> None:
        """Load a bundle, or take what is loaded.

        Args:
            model_name_or_path: Folder of a bundle, a loaded model, or a blocking engine.
            device: ``cpu``, ``cuda``, ``cuda:1`` …; None: the fastest.
            prompts: Name -> text put before a text to encode.
            default_prompt_name: Which of them is used if none is named.
            similarity_fn_name: What `similarity` computes.
            truncate_dim: Dimensions kept of each vector; None: all.
            others: Further arguments of sentence-transformers, all of them refused.

        Raises:
            UsageError: An argument makes no sense or is not supported, or the bundle is of another task.
            BundleError: Not a bundle, or a damaged one.
            ProviderError: Nothing here runs it correctly.
        """
        refuse(_LIBRARY, others)
        self.prompts = dict(prompts or {})
        if default_prompt_name is not None and default_prompt_name not in self.prompts:
            raise UsageError(f"there is no prompt {default_prompt_name!r}", f"There are {_names(self.prompts)}")
        if similarity_fn_name not in _SIMILARITIES:
            raise UsageError(f"there is no similarity {similarity_fn_name!r}", f"There are {', '.join(_SIMILARITIES)}")
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name = similarity_fn_name
        self.truncate_dim = None if truncate_dim is None else count_of(truncate_dim, "truncate_dim")
        self._source = Source(model_name_or_path, device=device, task="feature-extraction")
        self._source.check_blocking()

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text; the rest is cut off."""
        return self._source.processor.max_length

    def get_embedding_dimension(self) -> int:
        """Numbers in a vector."""
        whole = int(self._source.embed([""]).shape[1])
        return whole if self.truncate_dim is None else min(whole, self.truncate_dim)

    def get_sentence_embedding_dimension(self) -> int:
        """Numbers in a vector; the older name of `get_embedding_dimension`."""
        return self.get_embedding_dimension()

    def encode(
        self,
        sentences: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **others: Any,
    ) -> Any:
        """Vectors of texts.

        Args:
            sentences: A text, or several; ``inputs=`` is the same.
            prompt_name: Which of `prompts` is put before each text; ``prompt`` goes before it.
            prompt: A text that is put before each text.
            batch_size: Texts between two steps of the progress bar. How many run at once, hasten chooses by itself.
            show_progress_bar: Whether standard error shows how far it is.
            output_value: ``sentence_embedding``; token vectors are refused.
            precision: ``float32``; quantized vectors are refused.
            convert_to_numpy: Whether the result is one array; otherwise a list of torch tensors.
            convert_to_tensor: Whether the result is one torch tensor.
            normalize_embeddings: Whether vectors are given length 1.
            truncate_dim: Dimensions kept of each vector; None: those of the model.
            others: Further arguments of sentence-transformers, all of them refused: a device is chosen at loading.

        Returns:
            float32 [n, d] for several texts, [d] for one, in the form asked for.

        Raises:
            UsageError: An argument makes no sense or is not supported.
            InstallationError: A tensor was asked for and torch is not installed.
            ProviderError: ONNX Runtime failed.
        """
        if output_value != "sentence_embedding":
            raise UsageError(f"hasten has no output_value {output_value!r}", "Leave it out: it gives vectors of texts")
        if precision != "float32":
            raise UsageError(f"hasten gives no vectors of {precision}", "Quantize the float32 vectors yourself")
        given = others.pop("inputs", None) if sentences is None else sentences
        refuse(_LIBRARY, others)
        torch = import_torch() if convert_to_tensor or not convert_to_numpy else None
        alone = isinstance(given, str)
        texts = lead(self._prompt(prompt, prompt_name), [given] if alone else given, "encode")
        vectors = self._vectors(texts, count_of(batch_size, "batch_size"), show_progress_bar)
        kept = self.truncate_dim if truncate_dim is None else count_of(truncate_dim, "truncate_dim")
        found: Any = _finished(vectors, kept, normalize=normalize_embeddings)
        if torch is not None:
            found = torch.from_numpy(found)
            found = found if convert_to_tensor else list(found)
        return found[0] if alone else found

    def encode_query(self, sentences: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the prompt ``query``, if the model has one and no other is named."""
        return self.encode(sentences, **self._prompted(options, "query"))

    def encode_document(self, sentences: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the prompt ``document``, ``passage`` or ``corpus``, the first of them that the model has."""
        return self.encode(sentences, **self._prompted(options, "document", "passage", "corpus"))

    def similarity(self, first: Any, second: Any) -> Any:
        """How alike two lists of vectors are: [n, d], [m, d] -> float32 [n, m]; distances are negative.

        A torch tensor if one of the arguments is, else an array: sentence-transformers always gives a tensor.
        """
        one, other, tensor = _pair(first, second)
        return tensor(_similarities(self.similarity_fn_name, one[:, None, :], other[None, :, :]))

    def similarity_pairwise(self, first: Any, second: Any) -> Any:
        """How alike the vectors of each pair are: [n, d], [n, d] -> float32 [n]; otherwise as `similarity`."""
        one, other, tensor = _pair(first, second)
        return tensor(_similarities(self.similarity_fn_name, one, other))

    def close(self) -> None:
        """Free the model, if it was loaded here."""
        self._source.close()

    def _prompted(self, options: dict[str, Any], *names: str) -> dict[str, Any]:
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        found = next((name for name in names if name in self.prompts), None)
        return options if found is None else {**options, "prompt_name": found}

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            return prompt
        chosen = self.default_prompt_name if name is None else name
        if chosen is None:
            return ""
        if chosen not in self.prompts:
            raise UsageError(f"there is no prompt {chosen!r}", f"There are {_names(self.prompts)}")
        return self.prompts[chosen]

    def _vectors(self, texts: Sequence[str], step: int, progress: bool | None) -> NDArray[np.float32]:
        if not progress or not texts:
            return self._source.embed(texts)
        from rich.console import Console
        from rich.progress import track

        starts = range(0, len(texts), step)
        shown = track(starts, "Batches", console=Console(file=sys.stderr))
        return np.concatenate([self._source.embed(texts[start : start + step]) for start in shown])


def _finished(vectors: NDArray[np.float32], kept: int | None, *, normalize: bool) -> NDArray[np.float32]:
    """The first ``kept`` dimensions of [n, d], then of length 1 if asked for."""
    if kept is not None:
        vectors = np.ascontiguousarray(vectors[:, :kept])
    return _unit(vectors) if normalize else vectors


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)), np.float32)


def _names(prompts: Mapping[str, str]) -> str:
    return ", ".join(prompts) or "none: pass prompts={name: text}"


def _pair(first: Any, second: Any) -> tuple[NDArray[np.float32], NDArray[np.float32], Any]:
    """Both as float32 [n, d], and what makes the result of the kind that was given."""
    torch = sys.modules.get("torch")
    tensors = torch is not None and any(isinstance(one, torch.Tensor) for one in (first, second))
    one, other = (
        np.atleast_2d(np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, np.float32))
        for given in (first, second)
    )
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise UsageError(f"vectors of the shapes {one.shape} and {other.shape}", "Pass two arrays [n, d] of one d")
    return one, other, torch.from_numpy if torch is not None and tensors else np.asarray


def _similarities(name: str, one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of vectors along the last axis, broadcast over the others."""
    if name == "cosine":
        one, other = _unit(one), _unit(other)
    if name in {"cosine", "dot"}:
        return np.asarray(one[:, 0] @ other[0].T if one.ndim == 3 else np.einsum("nd,nd->n", one, other), np.float32)
    apart = one - other
    distances = np.abs(apart).sum(axis=-1) if name == "manhattan" else np.sqrt((apart * apart).sum(axis=-1))
    return np.asarray(-distances, np.float32)
