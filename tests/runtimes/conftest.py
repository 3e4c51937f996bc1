from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from session_graphs import WIDTH, weight

from artifacts.bundle import Bundle, BundleWriter
from artifacts.manifest import Manifest, SessionOptions, Source, TensorSpec, Variant
from artifacts.proof import Proof, VariantProof
from artifacts.target import CPU_PROVIDER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def needs_openvino() -> None:
    if find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("the OpenVINO plugin is not installed")


@pytest.fixture
def child_environment() -> Callable[..., dict[str, str]]:
    """Environment of a child Python that finds these folders first, then this repository."""

    def make(*folders: Path, **extra: str) -> dict[str, str]:
        paths = os.pathsep.join(str(folder) for folder in (*folders, ROOT))
        return {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **extra}

    return make


@dataclass(frozen=True)
class Recipe:
    """A variant of a test bundle."""

    build: Callable[[Path], object]
    providers: tuple[str, ...] = (CPU_PROVIDER,)
    status: str = "proven"
    tolerance: float = 1e-4
    session: SessionOptions = field(default_factory=SessionOptions)
    proven_on: str = ""


@pytest.fixture
def recipe() -> type[Recipe]:
    return Recipe


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[[Mapping[str, Recipe]], Bundle]:
    """A bundle of variants of the linear model."""

    def make(recipes: Mapping[str, Recipe]) -> Bundle:
        x = np.random.default_rng(2).standard_normal((16, WIDTH)).astype(np.float32)
        with BundleWriter(tmp_path / "bundle", force=True) as writer:
            for name, one in recipes.items():
                one.build(writer.staging / f"{name}.onnx")
            np.savez(writer.staging / "golden.npz", **{"input.x": x, "output.y": x @ weight()})
            spec = TensorSpec("x", "float32", ("n", WIDTH))
            manifest = Manifest(
                name="linear",
                task="tensors",
                source=Source("linear", "onnx", "sha256:" + "0" * 64, ""),
                toolchain=(),
                inputs=(spec,),
                outputs=(TensorSpec("y", "float32", ("n", WIDTH)),),
                processor=None,
                variants=tuple(_variant(name, one) for name, one in recipes.items()),
                files=(),
            )
            proofs = tuple(_proof(name, one) for name, one in recipes.items())
            return writer.commit(manifest, Proof("sha256:" + "0" * 64, proofs, ()))

    return make


def _variant(name: str, one: Recipe) -> Variant:
    return Variant(name, "cpu", one.providers, f"{name}.onnx", "fp32", "", one.session, one.tolerance, ())


def _proof(name: str, one: Recipe) -> VariantProof:
    provider = one.proven_on or one.providers[0]
    return VariantProof(
        name, one.status, provider, None, 0.0, (), (), (), 1, "too slow" if one.status == "refused" else ""
    )
