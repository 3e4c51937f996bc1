from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoder_graphs import DISABLED, run
from judging import Judged, judge_source, write_encoder
from session_graphs import WIDTH, linear, weight

from artifacts.errors import DataError
from compiler.data import Dataset, Row, neutral, read_data
from compiler.evidence import PROOF_SHAPES, TRIAL_SHAPES, Arrays, Evidence, gather
from compiler.export import export_model
from compiler.source import read_source


def test_the_golden_set_is_the_original_on_ragged_texts(judged: Judged) -> None:
    feeds, outputs = judged.evidence.golden
    assert set(feeds) == {"input_ids", "attention_mask"}
    assert feeds["input_ids"].shape[0] == outputs["sentence_embedding"].shape[0] == 16
    assert feeds["attention_mask"].min() == 0
    expected = run(judged.model, feeds, DISABLED)
    np.testing.assert_allclose(outputs["sentence_embedding"], expected, rtol=0, atol=1e-6)


def test_golden_bytes_are_the_same_every_time_and_not_compressed(judged: Judged, tmp_path: Path) -> None:
    data = judged.evidence.golden_bytes()
    assert data == judged.evidence.golden_bytes()
    again = judge_source(judged.source.path, tmp_path)
    assert data == again.evidence.golden_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert sorted(archive.namelist()) == sorted(
            ["input.input_ids.npy", "input.attention_mask.npy", "output.sentence_embedding.npy"]
        )


def test_the_original_has_full_marks(judged: Judged) -> None:
    def original(feeds: Arrays) -> Arrays:
        return {"sentence_embedding": run(judged.model, feeds, DISABLED)}

    mean, lowest = judged.evidence.fidelity(original)
    assert (mean.metric, mean.reference, mean.budget) == ("cosine_mean", 1.0, 0.01)
    assert mean.value == pytest.approx(1.0, abs=1e-6)
    assert (lowest.metric, lowest.budget) == ("cosine_min", 1.0)
    assert mean.samples == len(neutral("feature-extraction").rows) // 2
    assert mean.data == "built-in neutral text"
    assert judged.evidence.shortfall(original) == ""


def test_a_worse_model_falls_short_by_what_is_said(judged: Judged) -> None:
    def worse(feeds: Arrays) -> Arrays:
        vectors = run(judged.model, feeds, DISABLED)
        return {"sentence_embedding": vectors + np.float32(0.05) * np.sign(vectors[:, :1])}

    row = judged.evidence.fidelity(worse)[0]
    assert row.drop > 0.01
    assert judged.evidence.shortfall(worse) == f"cosine_mean drops by {row.drop:.4f}, allowed 0.0100"
    generous = replace(judged.evidence, budget=judged.evidence.budget.allowing(row.drop + 1e-6))
    assert generous.shortfall(worse) == ""


def test_a_model_that_gives_nan_falls_short(judged: Judged) -> None:
    def broken(feeds: Arrays) -> Arrays:
        return {"sentence_embedding": np.full((len(feeds["input_ids"]), 64), np.nan, np.float32)}

    assert judged.evidence.shortfall(broken).startswith("cosine_mean drops by 1.0000")


def test_the_budget_follows_max_drop(judged: Judged, tmp_path: Path) -> None:
    strict = judge_source(judged.source.path, tmp_path, max_drop=0.0001)
    assert strict.evidence.budget.limit == 0.0001
    assert strict.evidence.budget.metric == judged.evidence.budget.metric


def test_changes_and_the_result_are_timed_at_the_stated_shapes(judged: Judged) -> None:
    trials = [feeds["input_ids"].shape for feeds in judged.evidence.trial_feeds]
    assert trials == list(TRIAL_SHAPES)
    assert list(judged.evidence.proof_shapes) == list(PROOF_SHAPES)
    for (batch, length), feeds in judged.evidence.proof_shapes.items():
        assert feeds["input_ids"].shape == feeds["attention_mask"].shape == (batch, length)
        assert (feeds["attention_mask"] == 1).all()
        assert feeds["input_ids"].max() < 600


def gathered(folder: Path, data: Dataset) -> Evidence:
    source = read_source(str(write_encoder(folder)), "feature-extraction")
    exported = export_model(source)
    for name, content in exported.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return gather(source, exported, data, folder, seed=0, max_drop=None)


def test_long_texts_are_cut_and_it_is_said(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    source = read_source(str(tmp_path / "encoder.onnx"), "feature-extraction")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 512}))
    exported = export_model(source)
    for name, content in exported.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    rows = tuple(Row(f"{word} " * 200) for word in ("cat", "dog", "man", "woman"))
    evidence = gather(source, exported, Dataset(rows, "long.txt", labelled=False), tmp_path, seed=0, max_drop=None)
    assert evidence.notes == (
        "2 of 2 texts were cut to 128 tokens for judging",
        "2 of 2 texts were cut to 128 tokens for calibration",
    )
    assert evidence.feeds[0]["input_ids"].shape[1] == 128
    assert 3 in evidence.feeds[0]["input_ids"][:, -1], "the closing token stays"


def test_labelled_pairs_are_judged_by_rank_correlation(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    words = ["cat dog", "man woman", "red blue", "film music", "house park", "good bad"]
    lines = [f"the {pair.split()[0]}\tthe {pair.split()[1]}\t{index}" for index, pair in enumerate(words)]
    file.write_text("\n".join(["text\tpair\tlabel", *lines]) + "\n")
    data = read_data(file, None, "feature-extraction")
    assert data.labelled
    folder = tmp_path / "model"
    folder.mkdir()
    evidence = gathered(folder, data)
    assert evidence.budget.metric == "spearman"
    assert sum(len(feeds["input_ids"]) for feeds in evidence.feeds) == 6, "half of the pairs"
    assert sum(len(batch.examples) for batch in evidence.calibration) == 6
    model = export_model(read_source(str(folder / "encoder.onnx"), "feature-extraction")).model
    rows = evidence.fidelity(lambda feeds: {"sentence_embedding": run(model, dict(feeds), DISABLED)})
    assert [row.metric for row in rows] == ["spearman", "cosine_mean", "cosine_min"]
    assert (rows[0].samples, rows[0].data, rows[0].budget) == (3, "pairs.tsv", 0.01)
    assert rows[0].drop == pytest.approx(0.0, abs=1e-6)


def test_plain_tensors(tmp_path: Path) -> None:
    source = read_source(str(linear(tmp_path / "linear.onnx")), None)
    evidence = gather(source, export_model(source), neutral("tensors"), tmp_path, seed=0, max_drop=None)
    assert (evidence.task, evidence.data, evidence.rows) == ("tensors", "random tensors", ())
    assert list(evidence.proof_shapes) == [(1, 1), (8, 1)]
    feeds, outputs = evidence.golden
    np.testing.assert_allclose(outputs["y"], feeds["x"] @ weight(), rtol=1e-5, atol=1e-5)
    assert [feeds["x"].shape for feeds in evidence.trial_feeds] == [(1, WIDTH), (8, WIDTH)]
    (row,) = evidence.fidelity(lambda feeds: {"y": feeds["x"] @ weight() * np.float32(1.02)})
    assert row.metric == "relative_l2"
    assert row.drop == pytest.approx(0.02, rel=1e-3)
    assert row.samples == sum(len(one["x"]) for one in evidence.feeds)
    shortfall = evidence.shortfall(lambda feeds: {"y": feeds["x"] @ weight() * np.float32(1.02)})
    assert shortfall == "relative_l2 drops by 0.0200, allowed 0.0100"
    again = gather(source, export_model(source), neutral("tensors"), tmp_path, seed=0, max_drop=None)
    assert again.golden_bytes() == evidence.golden_bytes()


def test_a_label_that_the_model_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        read_data(tmp_path / "empty.txt", None, "feature-extraction")
