"""What a variant is compiled for: a device, the execution providers that may run it, and what they can execute."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError

CPU_PROVIDER = "CPUExecutionProvider"
OPENVINO_PROVIDER = "OpenVINOExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"


@dataclass(frozen=True)
class Target:
    """A kind of machine to compile for.

    Attributes:
        name: What the user types: ``cpu``, ``openvino``, ``cuda``, ``tensorrt``.
        device: ``cpu`` or ``cuda``: where the tensors live.
        providers: ONNX Runtime execution provider names, in order of preference. The first is what the variant is
            compiled for; the rest take the nodes that it leaves.
        float_type: Floating-point type that the provider computes in natively: ``float32`` or ``float16``.
        domains: Operator domains that may appear in a graph for this target.
    """

    name: str
    device: str
    providers: tuple[str, ...]
    float_type: str
    domains: tuple[str, ...]

    @property
    def provider(self) -> str:
        """The execution provider that the variant is compiled for."""
        return self.providers[0]

    @classmethod
    def parse(cls, name: str) -> Target:
        """The target of that name.

        Raises:
            UsageError: There is no such target.
        """
        for target in TARGETS:
            if target.name == name:
                return target
        raise UsageError(f"unknown target {name!r}", f"Choose one of {', '.join(t.name for t in TARGETS)}")


CPU = Target("cpu", "cpu", (CPU_PROVIDER,), "float32", ("", "com.microsoft"))
OPENVINO = Target("openvino", "cpu", (OPENVINO_PROVIDER, CPU_PROVIDER), "float32", ("", "com.microsoft"))
CUDA = Target("cuda", "cuda", (CUDA_PROVIDER, CPU_PROVIDER), "float16", ("", "com.microsoft"))
TENSORRT = Target("tensorrt", "cuda", (TENSORRT_PROVIDER, CUDA_PROVIDER, CPU_PROVIDER), "float16", ("",))

TARGETS: tuple[Target, ...] = (CPU, OPENVINO, CUDA, TENSORRT)
