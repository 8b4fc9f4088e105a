"""A graph cut in two: what depends on one of its inputs alone, computed when that changes, and the rest."""

from __future__ import annotations

from typing import Any


def values_of(model: Any, source: str) -> list[Any]:
    """Find the float results that depend on the input ``source`` alone and are used elsewhere, in the graph's order.

    For a UNet's context these are the keys and values of every cross-attention.
    """
    return [output for output, _ in _frontier(model, source)]


def before_cut(model: Any, source: str) -> Any:
    """The part that turns ``source`` into ``values_of`` it; outputs in that order. The model given is used up."""
    import openvino

    given = [part for part in model.get_parameters() if part.output(0).get_any_name() == source]
    results = [openvino.opset13.result(output) for output in values_of(model, source)]
    return openvino.Model(results, given)


def after_cut(model: Any, source: str) -> Any:
    """The rest: takes the values too, as ``value_names``; of ``source`` only the shape is used. Uses up the model."""
    import openvino

    parameters = model.get_parameters()
    for name, (output, uses) in zip(value_names(model, source), _frontier(model, source), strict=True):
        value = openvino.opset13.parameter(output.get_partial_shape(), output.get_element_type(), name=name)
        value.output(0).set_names({name})
        for use in uses:
            use.replace_source_output(value.output(0))
        parameters.append(value)
    return openvino.Model(model.get_results(), parameters)


def value_names(model: Any, source: str) -> list[str]:
    """Return the names of the inputs that ``after_cut`` adds: ``context.0``, …."""
    return [f"{source}.{index}" for index in range(len(values_of(model, source)))]


def _frontier(model: Any, source: str) -> list[tuple[Any, list[Any]]]:
    """Each value with the inputs that use it on the other side of the cut."""
    depends: dict[str, frozenset[str]] = {}
    nodes = model.get_ordered_ops()
    for node in nodes:
        named = [node.output(0).get_any_name()] if node.get_type_name() == "Parameter" else []
        sources = [depends[port.get_source_output().get_node().get_name()] for port in node.inputs()]
        depends[node.get_name()] = frozenset(named).union(*sources)
    found = []
    for node in nodes:
        if depends[node.get_name()] != {source} or node.get_type_name() == "Parameter":
            continue
        for output in node.outputs():
            uses = [use for use in output.get_target_inputs() if depends[use.get_node().get_name()] != {source}]
            if uses and output.get_element_type().is_real():
                found.append((output, uses))
    return found
