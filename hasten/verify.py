"""``hasten verify``: everything a bundle promises, checked here and now."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifacts.adapters import AdaptedGraph
from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import HastenError, ProviderError
from artifacts.manifest import Variant
from artifacts.target import Target
from runtimes.client import Worker
from runtimes.generate.adapters import open_graph
from runtimes.golden import Golden, check_golden, load_golden
from runtimes.providers import available


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: What was checked.
        status: ``ok``, ``skipped`` or ``failed``.
        detail: What was found.
    """

    name: str
    status: str
    detail: str


def verify(path: Path) -> Iterator[Finding]:
    """Hashes, grammar of each graph, the golden test of each variant on every provider here that it names, adapters.

    Raises:
        BundleError: The bundle does not open; nothing else can be checked then.
    """
    bundle = open_bundle(path)
    yield Finding("files", "ok", f"{len(bundle.manifest.files)} files have the size and hash that the manifest states")
    for variant in bundle.manifest.variants:
        yield _grammar(bundle, variant)
    golden = load_golden(bundle)
    probes = {probe.provider: probe for probe in available()}
    for variant in bundle.manifest.variants:
        for provider in variant.providers:
            found = probes.get(provider)
            if found is None or not found.ok:
                yield Finding(f"{variant.id} on {provider}", "skipped", found.reason if found else "unknown provider")
            else:
                yield _replay(bundle, variant, provider, golden)
        if variant.adapted is not None:
            yield _adapters(bundle, variant, variant.adapted)


def _grammar(bundle: Bundle, variant: Variant) -> Finding:
    name = f"grammar of {variant.model}"
    if importlib.util.find_spec("onnx_ir") is None:
        return Finding(name, "skipped", "needs pip install 'hasten[compile]'")
    import onnx_ir as ir

    from passes.grammar import check

    try:
        check(ir.load(bundle.path / variant.model), Target.parse(variant.target), finished=True)
    except (HastenError, ir.serde.SerdeError) as error:
        return Finding(name, "failed", str(error))
    return Finding(name, "ok", "well formed, operators known to its target")


def _adapters(bundle: Bundle, variant: Variant, graph: AdaptedGraph) -> Finding:
    """The graph that takes adapters without one, and the numbers of each adapter."""
    name = f"{variant.id} with adapters"
    names = [one.name for one in bundle.manifest.adapters or ()]
    try:
        adapted = open_graph(bundle, variant, graph)
        try:
            adapted.feeds(names)
        finally:
            adapted.close()
    except HastenError as problem:
        return Finding(name, "failed", problem.what)
    return Finding(name, "ok", f"without one the golden test holds; {', '.join(names)} can be used")


def _replay(bundle: Bundle, variant: Variant, provider: str, golden: Golden) -> Finding:
    name = f"{variant.id} on {provider}"
    try:
        with Worker(bundle.path / variant.model, provider, options=variant.session) as worker:
            error = check_golden(worker, golden, variant.tolerance, provider)
    except ProviderError as problem:
        # Only the provider that a variant was compiled for is promised; the rest are fallbacks.
        status = "failed" if provider == variant.providers[0] else "skipped"
        return Finding(name, status, problem.what)
    return Finding(name, "ok", f"golden error {error:.1e}, allowed {variant.tolerance:.1e}")
