"""What is right and wrong with this installation, and with a bundle on this machine.

Nothing but the standard library is imported before the distributions and packages were looked at: with two ONNX
Runtimes, or a foreign ``artifacts``, the rest of hasten may not import.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from artifacts.bundle import Bundle

OURS = ("artifacts", "passes", "runtimes", "compiler", "hasten")
COMPILE_MODULES = (
    *("torch", "transformers", "optimum", "requests", "onnx", "onnx_ir", "onnxscript", "safetensors", "scipy"),
    "tomli_w",
)
_MINIMUM_PYTHON = (3, 11)
_CUDA_LIBRARIES = ("cudart", "cublasLt", "cublas", "cufft", "curand", "cudnn")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: ``ok``, ``warn`` (works, with less) or ``broken``.
        detail: What was found, one line.
        remedy: What to do; empty when there is nothing to do.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that :func:`diagnose` found.

    Attributes:
        checks: In the order to read them.
    """

    checks: tuple[Check, ...]

    @property
    def broken(self) -> bool:
        """Something must be repaired: the command ends with exit code 1."""
        return any(check.status == "broken" for check in self.checks)


def diagnose(bundle: Path | None = None) -> Report:
    """Look at the installation, and with a bundle at what would run it here."""
    distributions = ort_distributions()
    checks = [_python(), *packages(), _compile_extra()]
    if any(check.status == "broken" for check in checks) or len(distributions) > 1:
        checks.append(_distributions(distributions))
    else:
        checks.append(_onnxruntime(distributions))
    if any(check.status == "broken" for check in checks):
        if bundle is not None:
            checks.append(Check("bundle", "warn", "not looked at: this installation is broken", "Repair it first"))
        return Report(tuple(checks))
    checks += [_cpu(), *_providers()]
    if bundle is not None:
        checks += _bundle(bundle)
    return Report(tuple(checks))


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < _MINIMUM_PYTHON:
        return Check("python", "broken", found, "Use Python 3.11 or newer")
    return Check("python", "ok", found)


def ort_distributions() -> tuple[str, ...]:
    """``name version`` of every installed distribution that brings a package named ``onnxruntime``."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        tops = (distribution.read_text("top_level.txt") or "").split()
        brings = "onnxruntime" in tops or (
            name.lower().replace("_", "-").startswith(("onnxruntime", "ort-"))
            and any(file.parts[:2] == ("onnxruntime", "__init__.py") for file in distribution.files or ())
        )
        if name and brings:
            found.setdefault(name, f"{name} {distribution.version}")
    return tuple(sorted(found.values()))


def _distributions(distributions: tuple[str, ...]) -> Check:
    """What is installed, without importing it."""
    if len(distributions) > 1:
        names = [text.split()[0] for text in distributions]
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in names else names[0]
        return Check(
            "onnxruntime",
            "broken",
            f"{len(distributions)} distributions overwrite each other's files: {', '.join(distributions)}",
            f"pip uninstall -y {' '.join(names)} && pip install {keep}",
        )
    if not distributions and find_spec("onnxruntime") is None:
        return Check("onnxruntime", "broken", "not installed", "pip install --force-reinstall hasten")
    return Check("onnxruntime", "ok", distributions[0] if distributions else "of no distribution")


def _onnxruntime(distributions: tuple[str, ...]) -> Check:
    found = _distributions(distributions)
    if found.status == "broken":
        return found
    from artifacts.errors import InstallationError

    try:
        from .environment import onnxruntime
    except InstallationError as error:
        name = distributions[0].split()[0] if distributions else "onnxruntime"
        return Check("onnxruntime", "broken", error.what, f"pip install --force-reinstall {name}")
    return replace(found, detail=f"{found.detail} at {Path(onnxruntime.__file__).parent}")


def packages() -> Iterator[Check]:
    """Our packages have plain names; another distribution's or a folder's may hide them."""
    clean = True
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        place = _location(name)
        if place is not None and place.parent != home:
            clean = False
            detail = f"the package {name!r} comes from {place}, not from {home}"
            yield Check("packages", "broken", detail, _unshadow(name, place))
    for name, owners in sorted(metadata.packages_distributions().items()):
        others = sorted({owner for owner in owners if owner.lower() != "hasten"})
        if name in OURS and others:
            clean = False
            remedy = f"Install hasten in an environment of its own, or pip uninstall {' '.join(others)}"
            yield Check("packages", "broken", f"{', '.join(others)} also installs a package named {name!r}", remedy)
    if clean:
        yield Check("packages", "ok", f"all of hasten's packages come from {home}")


def _location(name: str) -> Path | None:
    """Folder that a fresh ``import name`` would take the package from."""
    if name in sys.modules and (paths := list(getattr(sys.modules[name], "__path__", []))):
        loaded = Path(paths[0]).resolve()
    else:
        loaded = None
    try:
        # PathFinder, not find_spec: what is loaded already hides what a fresh process would find.
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name)
    except (ImportError, ValueError):
        return loaded
    if spec is None:
        return loaded
    places = list(spec.submodule_search_locations or ()) or ([spec.origin] if spec.origin else [])
    return Path(places[0]).resolve() if places else loaded


def _unshadow(name: str, place: Path) -> str:
    if place.parent == Path.cwd().resolve():
        return f"Run from another folder, or rename ./{name}: Python looks in the working folder first"
    return f"Take {place.parent} off PYTHONPATH, or install hasten in an environment of its own"


def _compile_extra() -> Check:
    missing = [name for name in COMPILE_MODULES if find_spec(name) is None]
    if missing:
        detail = f"not installed ({', '.join(missing)} missing): bundles run, compiling does not"
        return Check("compile extra", "warn", detail, "pip install 'hasten[compile]'")
    return Check("compile extra", "ok", "installed")


def _cpu() -> Check:
    from .environment import physical_cores
    from .fingerprint import cpu_features, cpu_name

    features = cpu_features()
    detail = f"{cpu_name()}, {physical_cores()} usable cores; {' '.join(features) or 'no features known'}"
    if any(feature in features for feature in ("avx512_vnni", "avx_vnni", "asimddp")) or not features:
        return Check("cpu", "ok", detail)
    return Check("cpu", "warn", f"{detail}: no int8 dot product, so int8 gains less and may saturate")


def _providers() -> Iterator[Check]:
    from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER

    from .environment import onnxruntime
    from .fingerprint import gpus
    from .providers import available, built_in, find

    for probe in available():
        name = f"provider {find(probe.provider).short}"
        if probe.ok:
            yield Check(name, "ok", f"works: {', '.join(probe.devices) or 'no device named'}")
        elif probe.provider == CPU_PROVIDER:
            yield Check(name, "broken", probe.reason, "Reinstall onnxruntime")
        else:
            # Absent hardware is no fault; a GPU that is here and does not work is worth a word.
            remedy = "pip install onnxruntime-ep-openvino" if "not installed" in probe.reason else ""
            status = "warn" if probe.provider == CUDA_PROVIDER and gpus() else "ok"
            yield Check(name, status, f"absent: {probe.reason}", remedy)
    if built_in(CUDA_PROVIDER):
        version = getattr(onnxruntime, "cuda_version", "") or "?"
        yield _cuda_libraries(version)


def _cuda_libraries(version: str) -> Check:
    import ctypes.util

    from artifacts.target import CUDA_PROVIDER

    from .fingerprint import gpus
    from .providers import preload

    preload(CUDA_PROVIDER)
    loaded = _mapped_libraries()
    missing = [
        f"lib{name}"
        for name in _CUDA_LIBRARIES
        if ctypes.util.find_library(name) is None and not any(file.startswith(f"lib{name}.so") for file in loaded)
    ]
    wanted = f"this onnxruntime wants CUDA {version}"
    if not missing:
        return Check("cuda libraries", "ok", f"all found; {wanted}")
    detail = f"{wanted}; missing: {', '.join(missing)}"
    if gpus():
        return Check("cuda libraries", "warn", detail, f"pip install 'onnxruntime-gpu[cuda,cudnn]' (CUDA {version})")
    return Check("cuda libraries", "ok", f"not needed: no NVIDIA GPU here ({detail})")


def _mapped_libraries() -> tuple[str, ...]:
    """File names of the shared libraries in this process."""
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(sorted({line.rsplit("/", 1)[-1] for line in text.splitlines() if ".so" in line}))


def _bundle(path: Path) -> Iterator[Check]:
    from artifacts.bundle import open_bundle
    from artifacts.errors import HastenError

    from .decide import decide

    try:
        bundle = open_bundle(path)
    except HastenError as error:
        yield Check("bundle", "broken", error.what, error.remedy)
        return
    yield Check("bundle", "ok", f"{bundle.manifest.name}: every file has its stated hash; {bundle.digest}")
    yield from _proofs(bundle)
    try:
        decision = decide(bundle, cache=False)
    except HastenError as error:
        yield Check("decision", "broken", error.what, error.remedy)
        return
    yield Check("decision", "ok", decision.reason)
    for candidate in decision.candidates:
        yield Check(f"candidate {candidate.name}", "ok", f"{candidate.status}: {candidate.reason}")


def _proofs(bundle: Bundle) -> Iterator[Check]:
    for variant in bundle.manifest.variants:
        proof = bundle.proof.variant(variant.id)
        name = f"proof of {variant.id}"
        if proof is None or proof.status == "unproven":
            detail = f"unproven: {proof.reason if proof and proof.reason else 'nothing was measured'}"
            yield Check(name, "warn", detail, f"Run `hasten prove` on a machine with {variant.target}")
        elif proof.status == "refused":
            yield Check(name, "warn", f"refused, never loaded: {proof.reason}")
        else:
            yield Check(name, "ok", f"proven on {proof.provider} ({proof.machine.cpu if proof.machine else 'unknown'})")
