"""Quality on real data: STS-B for sentence vectors, SST-2 for a classifier; and the sentences that peers embed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import SHARED, run_hasten
from numpy.typing import NDArray

STS_COLUMNS = "text=5,pair=6,label=4"


@dataclass(frozen=True)
class Sts:
    """A part of STS-B.

    Attributes:
        left: First sentences.
        right: Second sentences.
        scores: Human scores, 0 to 5.
    """

    left: list[str]
    right: list[str]
    scores: list[float]

    @property
    def sentences(self) -> list[str]:
        """All first sentences, then all second ones."""
        return self.left + self.right


def sts_path(part: str) -> Path:
    """The file of STS-B ``train``, ``dev`` or ``test``."""
    return SHARED / "data" / "stsb" / f"sts-{part}.csv"


def sts(part: str) -> Sts | None:
    """A part of STS-B; None where the data is absent."""
    path = sts_path(part)
    if not path.exists():
        print(f"STS-B is not at {path}: what needs it is not measured")
        return None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return Sts([row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows])


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    """A text a line."""
    path.write_text("".join(f"{' '.join(text.split())}\n" for text in texts), encoding="utf-8")
    return path


def spearman(vectors: NDArray[np.float32], scores: Sequence[float]) -> float:
    """Rank correlation of human scores and cosines; the vectors of all first sentences, then of all second ones."""
    from scipy.stats import spearmanr

    left, right = np.split(vectors, 2)
    return float(spearmanr(np.sum(left * right, axis=1), scores).statistic)


def compare_vectors(vectors: NDArray[np.float32], reference: NDArray[np.float32], dev: Sts) -> dict[str, float]:
    """Spearman, how many points it lies below the reference's, and cosines to the reference: mean and least."""
    cosines = np.sum(vectors * reference, axis=1)
    cosines /= np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    found = spearman(vectors, dev.scores)
    return {
        "spearman": found,
        "drop_points": 100.0 * (spearman(reference, dev.scores) - found),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
    }


def sst2_figures(folder: Path) -> dict[str, Any] | None:
    """Accuracy of each variant of the compiled SST-2 classifier on the test file; None where the data is absent."""
    model, data = SHARED / "models" / "minilm_sst2", SHARED / "data" / "sst2"
    if not model.exists() or not data.exists():
        print(f"SST-2 is not at {data}: its accuracy is not measured")
        return None
    bundle, lines = folder / "sst2", folder / "sst2.jsonl"
    wish = ("--target", "cpu", "--target", "openvino", "--keep-reference", "--quiet", "--max-drop", "0.3%")
    run_hasten("compile", str(model), "-o", str(bundle), "--data", str(data / "dev.tsv"), *wish)
    with (data / "test.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    lines.write_text("".join(json.dumps({"text": row["sentence"]}) + "\n" for row in rows), encoding="utf-8")
    found = {}
    for variant in variants(bundle):
        out = folder / f"{variant}.jsonl"
        run_hasten("run", str(bundle), "-i", str(lines), "-o", str(out), "--variant", variant)
        answers = [json.loads(line)["scores"] for line in out.read_text(encoding="utf-8").splitlines()]
        # Scores stand in the order of the classes: 0 negative, 1 positive.
        chosen = [int(np.argmax(list(scores.values()))) for scores in answers]
        found[variant] = float(np.mean([pick == int(row["label"]) for pick, row in zip(chosen, rows, strict=True)]))
        print(f"SST-2 accuracy, {variant}: {100 * found[variant]:.2f} % of {len(rows)}")
    reference = found.pop("reference")
    return {"samples": len(rows), "reference": reference, "accuracy": found}


def variants(bundle: Path) -> dict[str, str]:
    """Variant -> target, of those that were not refused where they were compiled."""
    import hasten

    opened = hasten.open_bundle(bundle)
    refused = {proof.variant for proof in opened.proof.variants if proof.status == "refused"}
    return {one.id: one.target for one in opened.manifest.variants if one.id not in refused}
