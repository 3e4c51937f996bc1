"""Tiny torch models as loaded tasks, and as transformers' pipelines: the same weights and tokenizer in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from artifacts.bundle import Bundle
from artifacts.manifest import Manifest, Source, TensorSpec, TextProcessor
from artifacts.proof import Proof
from runtimes.tasks import TASKS, Task

NAMES = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {
    "feature-extraction": ("last_hidden_state",),
    "question-answering": ("start_logits", "end_logits"),
}
TEXTS = [
    "Mary went to Paris, the green city on a river.",
    "the cats and dogs",
    "John's house is in London! Who was it? It was John.",
    "",
    "hello",
    "playing, eating - living in Berlin",
    "zzz unknown qqq words zzz",
    "é😀 Paris  \t paris",
]


@dataclass
class TorchRunner:
    """The thinnest stand-in for a session: the torch model itself."""

    model: Any

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "int64", ("batch", "length")) for name in NAMES)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            outputs = self.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    def close(self) -> None:
        """Nothing to free."""


def build(kind: type[Any], **options: Any) -> Any:
    """A random BERT of two layers."""
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=400,
        initializer_range=0.6,
        **options,
    )
    return kind(config).eval()


def make_task(folder: Path, name: str, model: Any, make: Callable[[Path], Path], text: TextProcessor) -> Task:
    """The model as `hasten.load` gives one."""
    (folder / "processor").mkdir(parents=True)
    make(folder / "processor" / "tokenizer.json")
    runner = TorchRunner(model)
    outputs = tuple(TensorSpec(one, "float32", ("batch",)) for one in OUTPUTS.get(name, ("logits",)))
    source = Source("tiny", "huggingface", "sha256:" + "0" * 64, "")
    manifest = Manifest("tiny", name, source, (), runner.inputs, outputs, text, (), ())
    bundle = Bundle(folder, manifest, Proof(f"sha256:{'0' * 64}", (), ()), "sha256:" + "0" * 64)
    return TASKS[name](bundle, runner)


def peer_tokenizer(task: Task, *, bert: bool = True, max_length: int = 400) -> Any:
    """The task's tokenizer as transformers'."""
    from transformers import PreTrainedTokenizerFast

    special = ("pad", "unk", "cls", "sep", "mask")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if bert else ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(task.bundle.path / "processor" / "tokenizer.json")),
        model_max_length=max_length,
        model_input_names=list(NAMES),
        **{f"{role}_token": word for role, word in zip(special, words, strict=True)},
    )
