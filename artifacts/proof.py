"""proof.json: what was measured on a bundle, apart from its content and outside its digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .constraints import (
    Count,
    Measured,
    OneOf,
    Sha256,
    printable,
)
from .digest import canonical_json, sha256_bytes
from .manifest import PROOF_NAME, Digest, FileEntry, Word, check_files
from .strict import SCHEMA, At, check_schema, decode, encode, read_json, require_unique

STATUSES = ("proven", "unproven", "refused")
"""``proven``: measured on its target, and kept its promises. ``unproven``: its target was not at hand. ``refused``:
measured, and failed; never loaded."""


@dataclass(frozen=True)
class Machine:
    """Where something was measured.

    Attributes:
        cpu: Model name.
        cores: Cores that the process may use.
        memory_gb: Main memory in 10⁹ bytes.
        system: Operating system and release.
        python: Version.
        onnxruntime: Version.
        devices: Accelerators, in order of their number.
    """

    cpu: str
    cores: Count
    memory_gb: Measured
    system: str
    python: str
    onnxruntime: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """Latency at one input shape, interleaved with the reference.

    Attributes:
        batch: Rows.
        length: Tokens in a row.
        reference_ms: Median milliseconds of the unoptimized graph.
        ms: Median milliseconds of the variant.
        ratio: Reference over variant; above 1 is faster.
        low: Lower quartile of the ratio over the rounds.
        high: Upper quartile.
    """

    batch: Count
    length: Count
    reference_ms: Measured
    ms: Measured
    ratio: Measured
    low: Measured
    high: Measured


@dataclass(frozen=True)
class Fidelity:
    """Quality on data, next to the reference.

    Attributes:
        metric: Such as ``spearman``, ``accuracy``, ``cosine`` or ``agreement``.
        value: Of the variant.
        reference: Of the original model.
        drop: Reference less value, in units of the metric.
        budget: Largest drop that was allowed.
        samples: Number of samples.
        data: Name of the data.
    """

    metric: str
    value: Measured
    reference: Measured
    drop: Measured
    budget: Measured
    samples: Count
    data: str


@dataclass(frozen=True)
class Step:
    """One pass, or one thing that was tried.

    Attributes:
        name: Text form of it.
        changed: Places rewritten.
        refused: Places left alone.
        kept: Whether it is in the variant.
        reason: Why it was reverted, or why it was kept.
        size: Bytes of graph and weights after it.
        ms: Latency at the largest shape after it, milliseconds.
        ratio: Latency before it over latency after it; above 1 is faster.
        error: Relative L2 error of the outputs to the reference's.
    """

    name: str
    changed: Count
    refused: Count
    kept: bool
    reason: str
    size: Count
    ms: Measured
    ratio: Measured
    error: Measured

    def __post_init__(self) -> None:
        """Reasons are often messages of others; the document takes one printable line."""
        object.__setattr__(self, "reason", printable(self.reason))


@dataclass(frozen=True)
class VariantProof:
    """What is known of one variant.

    Attributes:
        variant: Its id.
        status: ``proven``, ``unproven`` or ``refused``.
        provider: Execution provider that it was measured on; empty if on none.
        machine: Where it was measured.
        golden_error: Relative L2 error on the golden outputs there; infinite if an output was not finite.
        fidelity: Quality.
        speed: Latency.
        steps: What was done and tried, in order.
        size: Bytes of graph and weights.
        reason: Why it has this status.
    """

    variant: Word
    status: Annotated[str, OneOf(STATUSES)]
    provider: str
    machine: Machine | None
    golden_error: Measured
    fidelity: tuple[Fidelity, ...]
    speed: tuple[Speed, ...]
    steps: tuple[Step, ...]
    size: Count
    reason: str

    def __post_init__(self) -> None:
        """Reasons are often messages of others; the document takes one printable line."""
        object.__setattr__(self, "reason", printable(self.reason))


@dataclass(frozen=True)
class _Envelope:
    schema: int
    sha256: Sha256


@dataclass(frozen=True)
class Proof:
    """What was measured on a bundle.

    Attributes:
        bundle: Digest of the content that it speaks of, ``sha256:…``.
        variants: At most one for each variant.
        files: Evidence besides this document, such as report.html.
    """

    bundle: Digest
    variants: tuple[VariantProof, ...]
    files: tuple[FileEntry, ...]

    def variant(self, identity: str) -> VariantProof | None:
        """What is known of a variant; None if nothing is."""
        return next((proof for proof in self.variants if proof.variant == identity), None)

    def to_json(self) -> bytes:
        """Canonical bytes of proof.json, its own hash in it."""
        payload = encode(self)
        return canonical_json({"schema": SCHEMA, "sha256": sha256_bytes(canonical_json(payload)), "payload": payload})

    @classmethod
    def parse(cls, data: bytes) -> Proof:
        """The proof that the bytes of a proof.json hold.

        Raises:
            SchemaError: It breaks a MUST of docs/format.md; names the key.
        """
        at = At(PROOF_NAME)
        document = read_json(data, at)
        check_schema(document, at)
        payload = document.pop("payload", None)
        envelope = decode(_Envelope, document, at)
        proof = decode(cls, payload, at.field("payload"))
        if sha256_bytes(canonical_json(payload)) != envelope.sha256:
            raise at.field("sha256").error("the payload has another hash; the document was altered or cut")
        check_files(proof.files, at.field("payload").field("files"))
        names = [variant.variant for variant in proof.variants]
        require_unique(names, at.field("payload").field("variants"), "the variant")
        return proof
