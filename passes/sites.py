"""Weight-bearing operators seen as sites: what prunes, factors or quantizes acts on these and never searches the graph.

Only the main graph is searched: operators inside the branches of If or the bodies of Loop and Scan are no sites.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import onnx_ir as ir

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch's exporter leaves the module path of a node, as the text of a Python list."""

ORIGINS = "hasten.origins"
"""Metadata key under which passes leave which columns of which modules a product makes; see `passes.origins`."""

STANDARD_DOMAINS = ("", "ai.onnx")
"""The two spellings of the domain of the standard operators."""


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One product with a constant matrix: ``output = input @ W (+ bias)``, ``W [K, N]``.

    Attributes:
        node: The MatMul or Gemm (of alpha = beta = 1, transA = 0).
        weight: The constant operand; its tensor is ``W``, or ``W`` transposed (``[N, K]``) if ``transposed``.
        input: The other operand, ``[..., K]`` (``[M, K]`` for Gemm).
        output: ``[..., N]``.
        bias: The third operand of a Gemm, ``[N]`` or whatever broadcasts to ``[M, N]``; None for MatMul.
        path: Module path (``encoder.layer.0.output.dense``), or the name of the node where the exporter left none.
        transposed: The weight is stored ``[N, K]``: a Gemm with transB = 1.
    """

    node: ir.Node
    weight: ir.Value
    input: ir.Value
    output: ir.Value
    bias: ir.Value | None
    path: str
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        rows, columns = _matrix_shape(self.weight)
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True, eq=False)
class EmbeddingSite:
    """One look-up of rows in a constant table: ``output = table[indices]``.

    Attributes:
        node: The Gather, of axis 0.
        table: The constant, ``[rows, width]``.
        indices: Integers of any shape.
        output: ``[*indices.shape, width]``.
        path: Module path, or the name of the node.
    """

    node: ir.Node
    table: ir.Value
    indices: ir.Value
    output: ir.Value
    path: str

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, width)``."""
        return _matrix_shape(self.table)


@dataclass(frozen=True, eq=False)
class ConvSite:
    """One convolution over two spatial axes with a constant kernel (ONNX operator Conv).

    ``output[b, o, p] = bias[o] + sum_{c, t} weight[o, c, t] input[b, c, strides * p + dilations * t - pads]``, zeros
    beyond the edges; ``c`` runs over the inputs of the group of ``o``.

    Attributes:
        node: The Conv.
        weight: Its kernel, float ``[N, C / group, height, width]``.
        input: ``[B, C, H, W]``.
        output: ``[B, N, H', W']``.
        bias: Its third input, ``[N]``; None without.
        path: Module path, or the name of the node.
        group: Parts that see nothing of each other; C for a depthwise convolution.
        strides: Along height and width.
        pads: Zeros before height and width, then behind them; auto_pad is resolved.
        dilations: Distance of the taps along height and width.
    """

    node: ir.Node
    weight: ir.Value
    input: ir.Value
    output: ir.Value
    bias: ir.Value | None
    path: str
    group: int
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C / group, height, width)`` of the kernel."""
        tensor = constant_of(self.weight)
        if tensor is None:
            raise ValueError(f"{self.weight.name} is no constant any more")
        outputs, inputs, height, width = tensor.shape.numpy()
        return outputs, inputs, height, width


def convolution_sites(model: ir.Model) -> tuple[ConvSite, ...]:
    """Every Conv of the main graph with a constant float kernel over two spatial axes, in graph order.

    One whose auto_pad depends on a size that is not known is no site.
    """
    nodes = (node for node in model.graph if node.op_type == "Conv" and node.domain in STANDARD_DOMAINS)
    sites = (_convolution_site(node) for node in nodes)
    return tuple(site for site in sites if site is not None)


def linear_sites(model: ir.Model) -> tuple[LinearSite, ...]:
    """Every MatMul and Gemm of the main graph whose right operand is a constant float matrix, in graph order."""
    sites = (_linear_site(node) for node in model.graph if node.domain in STANDARD_DOMAINS)
    return tuple(site for site in sites if site is not None)


def embedding_sites(model: ir.Model) -> tuple[EmbeddingSite, ...]:
    """Every Gather along axis 0 of a constant float matrix in the main graph, in graph order."""
    sites: list[EmbeddingSite] = []
    for node in model.graph:
        if node.op_type != "Gather" or node.domain not in STANDARD_DOMAINS or len(node.inputs) != 2:
            continue
        table, indices = node.inputs
        if table is None or indices is None or not is_constant_matrix(table) or integer_attribute(node, "axis", 0) != 0:
            continue
        sites.append(EmbeddingSite(node, table, indices, node.outputs[0], module_path(node)))
    return tuple(sites)


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant (initializer or output of Constant); None where the value may differ between runs.

    An initializer that is a graph input too is a default that the caller may override: no constant.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    return ir.convenience.get_const_tensor(value)


def is_constant_matrix(value: ir.Value) -> bool:
    """Whether the value is a constant ``[rows, columns]`` of a floating-point type."""
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point()


def integer_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default where the node has none."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or its default where the node has none."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def module_path(node: ir.Node) -> str:
    """Path of the module that a node came from, as in ``named_modules()``.

    Read from the metadata of torch's exporter, whose last scope is the node itself; else from a node name of the older
    exporter (``/encoder/layer.0/output/dense/MatMul``); else the name of the node, or of its first output.
    """
    scopes = _scopes(node.metadata_props.get(NAME_SCOPES, ""))
    if len(scopes) > 1 and scopes[-2]:
        return scopes[-2]
    name = node.name or node.outputs[0].name or node.op_type
    parts = [part for part in name.split("/") if part]
    return ".".join(parts[:-1]) if name.startswith("/") and len(parts) > 1 else name


def _scopes(text: str) -> list[str]:
    try:
        scopes = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []
    return [scope for scope in scopes if isinstance(scope, str)] if isinstance(scopes, list) else []


def _linear_site(node: ir.Node) -> LinearSite | None:
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or weight is None or not is_constant_matrix(weight):
        return None
    bias = None
    transposed = False
    if node.op_type == "Gemm":
        plain = float_attribute(node, "alpha", 1.0) == 1.0 and float_attribute(node, "beta", 1.0) == 1.0
        if not plain or integer_attribute(node, "transA", 0) != 0:
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        transposed = integer_attribute(node, "transB", 0) == 1
    return LinearSite(node, weight, source, node.outputs[0], bias, module_path(node), transposed)


def _matrix_shape(value: ir.Value) -> tuple[int, int]:
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is no constant any more")
    rows, columns = tensor.shape.numpy()
    return rows, columns


def _convolution_site(node: ir.Node) -> ConvSite | None:
    if len(node.inputs) < 2:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    tensor = constant_of(weight)
    if source is None or weight is None or tensor is None:
        return None
    if len(tensor.shape) != 4 or not tensor.dtype.is_floating_point():
        return None
    _, _, height, width = tensor.shape.numpy()
    strides, dilations = _pair(node, "strides"), _pair(node, "dilations")
    pads = _pads(node, source, (height, width), strides, dilations)
    if pads is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    group = integer_attribute(node, "group", 1)
    return ConvSite(
        node, weight, source, node.outputs[0], bias, module_path(node), group, strides, pads, dilations
    )  # fmt: skip


def _pair(node: ir.Node, name: str) -> tuple[int, int]:
    attribute = node.attributes.get(name)
    first, second = (1, 1) if attribute is None else attribute.as_ints()
    return first, second


def _pads(
    node: ir.Node, source: ir.Value, kernel: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Zeros before both axes and behind both; None where auto_pad depends on a size that is not known."""
    attribute = node.attributes.get("auto_pad")
    automatic = "NOTSET" if attribute is None else attribute.as_string()
    if automatic == "NOTSET":
        stated = node.attributes.get("pads")
        top, left, bottom, right = (0, 0, 0, 0) if stated is None else stated.as_ints()
        return top, left, bottom, right
    before, behind = [0, 0], [0, 0]
    for axis in range(2 if automatic != "VALID" else 0):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        size = None if source.shape is None or len(source.shape) != 4 else source.shape[2 + axis]
        if strides[axis] == 1:
            total = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
        else:
            return None
        less, more = total // 2, total - total // 2
        before[axis], behind[axis] = (less, more) if automatic == "SAME_UPPER" else (more, less)
    return before[0], before[1], behind[0], behind[1]
