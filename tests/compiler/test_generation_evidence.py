"""Evidence of a decoder, gathered of a toy one: what it is judged on, and what the judgement says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from numpy.typing import NDArray

from artifacts.errors import DataError, UnsupportedError
from artifacts.manifest import TensorSpec, TextProcessor
from artifacts.signature import STEP_INPUTS, cache_names
from compiler.data import Dataset, Row, neutral
from compiler.evidence import Evidence, gather
from compiler.export import Exported
from compiler.generation import PROOF_SHAPES, TRIAL_SHAPES
from compiler.source import ModelSource

Arrays = dict[str, NDArray[Any]]
TASK = "text-generation"
VOCABULARY = len(tiny_models.vocabulary())
PAST = [name for pair in cache_names(0) for name in pair[:1]]
CACHE = ("batch", 1, "capacity", 1)
INPUTS = (*(TensorSpec(*spec) for spec in STEP_INPUTS), *(TensorSpec(name, "float32", CACHE) for name in PAST))
OUTPUTS = (TensorSpec("logits", "float32", ("batch", "positions", VOCABULARY)),)


def decoder(feeds: Mapping[str, NDArray[Any]], *, sharper: float = 1.0, deaf: bool = False) -> Arrays:
    """Its keys are the tokens, its logits a function of their running sum; ``deaf``: it reads no cache."""
    keys = feeds[PAST[0]].copy() * (0.0 if deaf else 1.0)
    places, rows = feeds["position_ids"], np.arange(len(keys))[:, None]
    for row, last in enumerate(feeds["seqlens_k"]):
        kept = places[row] <= last
        keys[row, 0, places[row][kept], 0] = feeds["input_ids"][row][kept]
    sums = np.cumsum(keys[:, 0, :, 0], axis=1)[rows, places[rows, feeds["logits_index"]]]
    logits = sharper * np.cos(sums[..., None] * np.arange(1, VOCABULARY + 1))
    return {"logits": logits.astype(np.float32), "present.0.key": keys, "present.0.value": keys}


def judge(folder: Path, data: Dataset, *, reference: Any = decoder, context: int = 512, **options: Any) -> Evidence:
    tiny_models.write_tokenizer(folder)
    processor = TextProcessor("tokenizer.json", context, 1, "[PAD]", 0, pairs=False)
    weight = ir.Value(name="w", const_value=ir.tensor(np.zeros(10**6, np.float32), name="w"))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[weight]), ir_version=10)
    source = ModelSource("toy", "huggingface", folder, TASK, {}, "Toy", "sha256:0", None, folder)
    exported = Exported(model, INPUTS, OUTPUTS, reference, processor)
    return gather(source, exported, data, folder, **{"seed": 0, "max_drop": None, **options})


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return judge(tmp_path_factory.mktemp("toy"), neutral(TASK))


def test_it_is_timed_at_decode_and_prefill(evidence: Evidence) -> None:
    assert tuple(feeds["input_ids"].shape for feeds in evidence.trial_feeds) == TRIAL_SHAPES
    assert tuple(evidence.proof_shapes) == PROOF_SHAPES
    assert evidence.product_rows == (1, 128)


def test_the_original_has_no_drop(evidence: Evidence) -> None:
    perplexity, agreement = evidence.fidelity(decoder)
    assert (perplexity.metric, perplexity.drop, perplexity.budget) == ("perplexity", 0.0, 0.01)
    assert perplexity.value == perplexity.reference > 1.0
    assert (agreement.metric, agreement.value, agreement.budget) == ("agreement", 1.0, 1.0)
    assert perplexity.samples == sum(int(feeds["seqlens_k"].sum()) for feeds in evidence.feeds) > 500
    assert evidence.shortfall(decoder) == ""


def test_a_rise_of_perplexity_over_the_budget_is_told(evidence: Evidence) -> None:
    def worse(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return decoder(feeds, sharper=3.0)

    (found, _) = evidence.fidelity(worse)
    assert found.drop > 0.01
    assert evidence.shortfall(worse) == f"perplexity rises by {found.drop:.4f}, allowed 0.0100"


class Runs:
    """A session that is a function."""

    def __init__(self, run: Any) -> None:
        self.run = run


def test_the_error_is_also_that_of_going_on(evidence: Evidence) -> None:
    def deaf(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return decoder(feeds, deaf=True)

    assert evidence.error(Runs(decoder)) == 0.0
    assert evidence.error(Runs(deaf)) > 0.1
    alone = replace(evidence, task="tensors")
    assert alone.error(Runs(deaf)) == 0.0, "the golden test alone does not see it"


def test_golden_holds_logits_only(evidence: Evidence) -> None:
    assert list(evidence.golden.outputs) == ["logits"]
    assert evidence.golden.feeds["seqlens_k"].tolist() == [11, 6]
    assert list(evidence.golden.feeds) == [spec.name for spec in INPUTS]


def test_calibration_and_judging_share_no_text(tmp_path: Path) -> None:
    words = tiny_models.WORDS
    rows = tuple(Row(" ".join(words[(index + i) % len(words)] for i in range(9))) for index in range(len(words)))
    evidence = judge(tmp_path, Dataset(rows, "words.txt", labelled=False), calibration_rows=5)
    judged = {tuple(row) for feeds in evidence.feeds for row in feeds["input_ids"]}
    learnt = [tuple(row) for batch in evidence.calibration for row in batch.feeds["input_ids"]]
    assert len(learnt) == 5
    assert not judged & set(learnt)
    assert evidence.data == "words.txt"


def test_windows_are_no_longer_than_the_context(tmp_path: Path) -> None:
    evidence = judge(tmp_path, neutral(TASK), context=16)
    assert {feeds["input_ids"].shape[1] for feeds in evidence.feeds} == {16}
    assert tuple(evidence.proof_shapes) == ((1, 1), (8, 1), (1, 16))


def test_one_text_serves_as_both(tmp_path: Path) -> None:
    evidence = judge(tmp_path, Dataset((Row("the cat is in the park"),), "one.txt", labelled=False))
    assert sum(len(batch.examples) for batch in evidence.calibration) == 1
    assert evidence.fidelity(decoder)[0].samples == 7


def test_a_model_that_gives_nan_is_refused(tmp_path: Path) -> None:
    def broken(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return {name: array * np.float32(np.nan) for name, array in decoder(feeds).items()}

    with pytest.raises(UnsupportedError, match="not finite for built-in neutral text"):
        judge(tmp_path, neutral(TASK), reference=broken)


def test_a_text_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no text of two tokens"):
        judge(tmp_path, Dataset((Row("the"),), "one.txt", labelled=False), context=1)
