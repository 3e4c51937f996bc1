"""A bundle under ONNX Runtime's profiler."""

from __future__ import annotations

import numpy as np

from artifacts.bundle import Bundle
from artifacts.manifest import TensorSpec

from .kernels import Kernel

_SEED = 12


def profile_bundle(
    bundle: Bundle,
    *,
    batch: int,
    length: int,
    device: str | None = None,
    provider: str | None = None,
    variant: str | None = None,
    threads: int = 0,
) -> tuple[Kernel, ...]:
    """What each kernel of the variant that `load` chooses takes of a run, in a child process.

    Args:
        bundle: The bundle.
        batch: Rows of the input; random ids, nothing masked. Plain tensors are the golden inputs whatever it says.
        length: Tokens of a row; at most the model's longest. Of a decoder 1 is a step after 128 tokens.
        device: ``cpu``, ``cuda``, ``cuda:1``...; None: any.
        provider: Execution provider, full or short name; None: any.
        variant: Id of a variant; None: any.
        threads: Threads within an operator; 0: one a physical core.

    Raises:
        UsageError: No such device, provider or variant.
        ProviderError: Nothing here runs the bundle correctly, or the profile cannot be read.
    """
    from .bench import synthetic
    from .client import Worker
    from .decide import decide
    from .generate.feeds import prompt_feeds, written_step
    from .golden import load_golden

    chosen = decide(bundle, device=device, provider=provider, variant=variant, threads=threads)
    golden = load_golden(bundle).feeds
    feeds = dict(golden)
    if bundle.manifest.generation is not None:
        feeds = written_step(bundle.manifest, batch) if length == 1 else prompt_feeds(bundle.manifest, batch, length)
    elif bundle.manifest.processor is not None:
        rng, longest = np.random.default_rng(_SEED), min(length, bundle.manifest.processor.max_length)
        inputs: tuple[TensorSpec, ...] = bundle.manifest.inputs
        feeds = {spec.name: synthetic(spec, golden[spec.name], batch, longest, rng) for spec in inputs}
    found = bundle.variant(chosen.variant)
    with Worker(
        bundle.path / found.model, chosen.provider, options=found.session, device=chosen.device, threads=threads
    ) as worker:
        return worker.profile(feeds)
