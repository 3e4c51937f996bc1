"""Give an exported graph the names of the model: module paths for weights, unique names for everything else."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

NAME_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(
    model: ir.Model, prefix: str, outputs: Sequence[str], parameters: Mapping[str, NDArray[np.generic]]
) -> tuple[str, ...]:
    """Rename in place, and strip all metadata but the module path of each node (`NAME_SCOPES`).

    Args:
        model: As torch.onnx.export leaves it.
        prefix: Attribute of the wrapper that holds the model; dropped from all paths.
        outputs: New names of the graph's outputs.
        parameters: Parameters and buffers of the original model by module path, as arrays that share its memory.

    Returns:
        Module paths of the parameters that the graph uses.
    """
    _strip_metadata(model, prefix)
    for value in list(model.graph.initializers.values()):
        _rename_initializer(model, value, str(value.name).removeprefix(f"{prefix}."))
    _name_tied(model, parameters)
    _split_tied(model, parameters)
    _name_transposed(model, parameters)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = f"__output_{name}"
    taken = {*outputs, *(str(value.name) for value in model.graph.inputs), *model.graph.initializers}
    for value in _internal_values(model):
        name = str(value.name)
        while name in taken:
            name = f"{name}_"
        value.name = name
        taken.add(name)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    return tuple(name for name in model.graph.initializers if name in parameters)


def _strip_metadata(model: ir.Model, prefix: str) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    names: set[str] = set()
    for index, node in enumerate(model.graph):
        scopes = _scopes(node, prefix)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props[NAME_SCOPES] = repr(scopes)
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{index}"
        names.add(node.name)
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _scopes(node: ir.Node, prefix: str) -> list[str]:
    """Module paths around a node, outermost first, then its own name."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return []
    return [str(scope).removeprefix(f"{prefix}.") for scope in scopes if scope != prefix]


def _rename_initializer(model: ir.Model, value: ir.Value, name: str) -> None:
    if name != value.name and name not in model.graph.initializers:
        value.name = name
    if value.const_value is not None:
        value.const_value.name = value.name


def _name_tied(model: ir.Model, parameters: Mapping[str, NDArray[np.generic]]) -> None:
    """Of the names of a tied parameter, take that of the module which reads it as it is (the embedding's)."""
    for node in model.graph:
        if node.op_type == "Transpose":
            continue
        for value in node.inputs:
            if value is None or value.name is None or value.name not in parameters:
                continue
            if value.name not in model.graph.initializers:
                continue
            for path in weights_around(node, parameters):
                if path not in model.graph.initializers and _same_memory(parameters[path], parameters[value.name]):
                    _rename_initializer(model, value, path)
                    break


def _split_tied(model: ir.Model, parameters: Mapping[str, NDArray[np.generic]]) -> None:
    """Give the product of a tied parameter a matrix of its own: its name, the memory of the other, ready for MatMul.

    The exporter leaves a Transpose of the table that the embedding reads, to be computed in each run.
    """
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Transpose" else None
        if table is None or table.name is None or table.name not in model.graph.initializers:
            continue
        array = parameters.get(table.name)
        if array is None or array.ndim != 2 or list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
            continue
        paths = (path for path in weights_around(node, parameters) if path not in model.graph.initializers)
        path = next((path for path in paths if _same_memory(parameters[path], array)), None)
        if path is None:
            continue
        tensor = ir.Tensor(array.T, name=path)
        weight = ir.val(path, const_value=tensor)
        model.graph.register_initializer(weight)
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        model.graph.remove(node, safe=True)


def _same_memory(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    return one.shape == other.shape and one.ctypes.data == other.ctypes.data


def _name_transposed(model: ir.Model, parameters: Mapping[str, NDArray[np.generic]]) -> None:
    """Name matrices that the exporter transposed after the parameter they are, and let them share its memory."""
    named: dict[str, ir.Value] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.name is None or value.name in parameters:
                continue
            if value.name not in model.graph.initializers:
                continue
            for path in weights_around(node, parameters):
                if not _is_transposed(value, parameters[path]):
                    continue
                if path in named and named[path] is not value:
                    ir.convenience.replace_all_uses_with(value, named[path])
                    del model.graph.initializers[value.name]
                elif path not in model.graph.initializers:
                    value.const_value = ir.Tensor(parameters[path].T, name=path)
                    _rename_initializer(model, value, path)
                    named[path] = value
                break


def weights_around(node: ir.Node, parameters: Mapping[str, NDArray[np.generic]]) -> Iterator[str]:
    """Parameters named ``weight`` of the modules that a node stands in, innermost first."""
    scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
    for scope in reversed(scopes):
        path = f"{scope}.weight"
        if path in parameters:
            yield path


def _is_transposed(value: ir.Value, parameter: NDArray[np.generic]) -> bool:
    tensor = value.const_value
    if tensor is None or parameter.ndim != 2 or tuple(tensor.shape) != parameter.shape[::-1]:
        return False
    return bool(np.array_equal(tensor.numpy(), parameter.T))


def _internal_values(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        for value in node.outputs:
            if value.name and not value.is_graph_output():
                yield value
