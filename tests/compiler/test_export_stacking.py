"""Deep models: a few layers are traced, the others are copies with weights of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from tiny_decoders import write_decoder

from artifacts.signature import decoder_problem
from compiler.export import Exported, decoder, export_model
from compiler.export.causal_attention import Layer
from compiler.export.decoder_survey import survey
from compiler.export.stacking import Parameters, Stack, plan_stack, repeat_layers, shortened
from compiler.source import read_source
from passes.sites import linear_sites

DEPTH = 8


def model_of(**options: object) -> tuple[transformers.PreTrainedModel, tuple[Layer, ...]]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.SmolLM3Config(**{**sizes, "num_key_value_heads": 1, "pad_token_id": 0, **options})
    with torch.device("meta"):
        return transformers.SmolLM3ForCausalLM(config), survey(config, "SmolLM3ForCausalLM")


def test_the_plan_of_equal_layers() -> None:
    stack = plan_stack(*model_of(num_hidden_layers=6, no_rope_layers=[1] * 6))
    assert stack is not None
    assert (stack.path, stack.traced, stack.templates) == ("model.layers", 3, (0, 1, 2, 2, 2, 2))


def test_the_plan_of_layers_of_two_kinds() -> None:
    """A template neither is nor follows the first of its kind."""
    stack = plan_stack(*model_of(num_hidden_layers=12, no_rope_layers=[1, 1, 0] * 4))
    assert stack is not None
    assert (stack.traced, stack.templates) == (6, (0, 1, 2, 3, 4, 5, 4, 4, 5, 4, 4, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 2, "no_rope_layers": [1, 1]},
        {"num_hidden_layers": 8, "no_rope_layers": [1] * 7 + [0]},
    ],
)
def test_no_plan(options: dict[str, object]) -> None:
    assert plan_stack(*model_of(**options)) is None


def test_a_shortened_model_is_whole_again() -> None:
    model, layers = model_of(num_hidden_layers=6, no_rope_layers=[1] * 6)
    stack = plan_stack(model, layers)
    assert stack is not None
    with shortened(model, stack):
        assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert len(model.model.layers) == model.config.num_hidden_layers == 6


def whole_and_stacked(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[Exported]:
    source = read_source(str(write_decoder(folder / "model", name, **options)))
    stacked = export_model(source)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "plan_stack", lambda model, layers: None)
        return [export_model(source), stacked]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama tied", {"num_hidden_layers": DEPTH}),
        pytest.param(
            "Gemma 3",
            {"num_hidden_layers": 10, "layer_types": ["sliding_attention", "full_attention"] * 5},
            marks=pytest.mark.slow,
        ),
        pytest.param("GPT-2", {"n_layer": DEPTH, "num_hidden_layers": DEPTH}, marks=pytest.mark.slow),
    ],
)
def test_the_same_graph_as_of_all_layers(
    name: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []

    def repeat(model: ir.Model, stack: Stack, parameters: Parameters) -> None:
        traced.append(stack.traced)
        repeat_layers(model, stack, parameters)

    monkeypatch.setattr(decoder, "repeat_layers", repeat)
    whole, stacked = whole_and_stacked(name, tmp_path, monkeypatch, **options)
    assert len(traced) == 1
    assert traced[0] < options["num_hidden_layers"]
    assert (stacked.inputs, stacked.outputs) == (whole.inputs, whole.outputs)
    assert decoder_problem(stacked.inputs, stacked.outputs) is None
    operators = [Counter(node.op_type for node in exported.model.graph) for exported in (whole, stacked)]
    assert operators[0] == operators[1]
    assert stacked.attentions_emitted == options["num_hidden_layers"]
    sites = [{site.path: site for site in linear_sites(exported.model)} for exported in (whole, stacked)]
    assert list(sites[0]) == list(sites[1])
    for path, site in sites[0].items():
        one, other = site.weight.const_value, sites[1][path].weight.const_value
        assert one is not None
        assert other is not None
        assert np.array_equal(one.numpy(), other.numpy())
    assert stacked.error <= 4 * whole.error
