"""What cannot be a decoder's graph is said by name: from the config alone, or before the weights are used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_decoders import write_decoder

from artifacts.errors import SourceError, UnsupportedError
from compiler.decoders import named_refusal
from compiler.export import export_model
from compiler.export.causal_attention import Layer
from compiler.export.decoder_survey import decoder_refusal, survey
from compiler.source import read_source

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "deepseek_v3"}, "latent"),
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "mixtral", "num_local_experts": 8}, r"mixture of experts \(num_local_experts = 8\)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "vision_config": {}}, "images"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ({"model_type": "llama", "layer_types": ["full_attention", "chunked_attention"]}, "kind chunked_attention"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 4}, "between layers"),
    ],
)
def test_refused_by_the_config_without_torch(config: dict[str, object], reason: str) -> None:
    assert re.search(reason, named_refusal(config))


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        ({"model_type": "bert", **TINY}, "BertLMHeadModel", "neither causal nor a sliding window"),
        ({"model_type": "falcon", **TINY}, "FalconForCausalLM", "does not use transformers' attention interface"),
        ({"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 4}, "XLNetLMHeadModel", "no position_ids"),
        ({"model_type": "diffllama", **TINY}, "DiffLlamaForCausalLM", "more than once in layer 0"),
        ({"model_type": "llama", **TINY, "num_attention_heads": 5}, "LlamaForCausalLM", "makes no LlamaForCausalLM"),
        (
            {"model_type": "bert", **TINY},
            "GPT2LMHeadModel",
            "do not belong together: GPT2LMHeadModel is of gpt2, not of bert",
        ),
        (
            {"model_type": "gpt2"},
            "LlamaForCausalLM",
            "do not belong together: LlamaForCausalLM is of llama, not of gpt2",
        ),
    ],
)
def test_refused_by_a_run_without_weights(config: dict[str, object], architecture: str, reason: str) -> None:
    refusal = decoder_refusal(config, architecture)
    assert reason in refusal
    assert architecture in refusal
    assert "\n" not in refusal


def test_nothing_speaks_against_a_large_model_and_nothing_of_it_is_allocated() -> None:
    config = {
        **{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 8192, "intermediate_size": 29568},
        **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    }
    assert decoder_refusal(config, "Qwen2ForCausalLM") == ""


def test_the_survey_tells_what_each_layer_asks_for() -> None:
    config = transformers.Gemma2Config(
        **TINY,
        num_key_value_heads=2,
        head_dim=20,
        query_pre_attn_scalar=16,
        sliding_window=9,
        attn_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"],
    )
    sliding, full = survey(config, "Gemma2ForCausalLM")
    assert full == Layer(heads=4, kv_heads=2, width=20, scale=0.25, softcap=30.0, window=0, sinks=False)
    assert sliding == Layer(heads=4, kv_heads=2, width=20, scale=0.25, softcap=30.0, window=9, sinks=False)
    assert full.cache_width == 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("refused") / "model")


def changed(folder: Path, to: Path, **tensors: torch.Tensor | None) -> str:
    """A copy of the model with tensors replaced, added or, for None, left out; ``__`` stands for a dot."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del weights[key]
        else:
            weights[key] = tensor
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"model__layers__1__mlp__up_proj__weight": None}, "lack model.layers.1.mlp.up_proj.weight"),
        ({"model__layers__2__mlp__up_proj__weight": torch.zeros(48, 32)}, "unknown tensor model.layers.2.mlp.up_proj"),
        (
            {"model__layers__0__mlp__up_proj__weight": torch.zeros(40, 32)},
            r"model.layers.0.mlp.up_proj.weight is \[40, 32\] where config.json makes it \[48, 32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor | None], text: str
) -> None:
    source = read_source(changed(folder, tmp_path / "model", **tensors))
    with pytest.raises(SourceError, match=text):
        export_model(source)


def test_a_refused_model_is_told_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8})
    )
    with pytest.raises(UnsupportedError, match="MixtralForCausalLM is a mixture of experts"):
        read_source(str(tmp_path))
