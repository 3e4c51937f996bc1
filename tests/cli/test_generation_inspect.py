"""``hasten inspect`` of a model that is no bundle: supported or not, and why, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from real_command import assert_refused, listing, ok, warm


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_supported_decoder(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "intermediate_size": 96}
    folder = write_config(tmp_path / "tiny llama", **config)
    before = listing(tmp_path)
    done = ok(warm("inspect", folder, "--json"))
    assert done.err == ""
    assert done.document == {
        "name": "tiny llama",
        "architecture": "LlamaForCausalLM",
        "task": "text-generation",
        "supported": True,
        "reason": "",
        "facts": {"hidden size": 64, "layers": 2, "attention heads": 4, "key/value heads": 2, "vocabulary": 300},
    }
    shown = ok(warm("inspect", folder)).out
    for part in ("tiny llama", "LlamaForCausalLM", "text-generation", "key/value heads", "yes"):
        assert part in shown, part
    assert listing(tmp_path) == before


def test_a_supported_encoder(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "bert", architectures=["BertForMaskedLM"], model_type="bert", hidden_size=32)
    found = ok(warm("inspect", folder, "--json")).document
    assert (found["task"], found["supported"]) == ("fill-mask", True)
    (folder / "modules.json").write_text("[]")
    assert ok(warm("inspect", folder, "--json")).document["task"] == "feature-extraction"


@pytest.mark.parametrize(
    ("architecture", "model_type", "more", "says"),
    [
        ("MambaForCausalLM", "mamba", {}, "recurrent state"),
        ("MixtralForCausalLM", "mixtral", {"num_local_experts": 8}, "mixture of experts"),
        ("DeepseekV3ForCausalLM", "deepseek_v3", {}, "latent"),
        ("BloomForCausalLM", "bloom", {}, "alibi"),
        ("LlamaForCausalLM", "llama", {"quantization_config": {"quant_method": "awq"}}, "quantized already (awq)"),
        ("ViTForImageClassification", "vit", {}, "serves image-classification"),
        ("BartForConditionalGeneration", "bart", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("MadeUpForCausalLM", "made-up", {}, "has no architecture MadeUpForCausalLM"),
    ],
)
def test_what_is_not_supported(
    tmp_path: Path, architecture: str, model_type: str, more: dict[str, object], says: str
) -> None:
    folder = write_config(tmp_path / "model", architectures=[architecture], model_type=model_type, **more)
    done = warm("inspect", folder, "--json")
    assert_refused(done, 3, "model cannot be compiled", says)
    assert done.document["supported"] is False
    assert says.lower() in done.document["reason"].lower()
    shown = warm("inspect", folder)
    assert_refused(shown, 3, "model cannot be compiled", says)
    assert architecture in shown.out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{nope", "config.json is not valid JSON"),
        ("[]", "names no architectures"),
        ("{}", "names no architectures"),
        ('{"architectures": [1]}', "names no architectures"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "config.json").write_text(content)
    done = warm("inspect", tmp_path)
    assert_refused(done, 3, says)
    assert done.out == ""


def test_what_is_neither_a_bundle_nor_a_model(tmp_path: Path) -> None:
    assert_refused(warm("inspect", tmp_path), 6, "is no bundle")
    assert_refused(warm("inspect", tmp_path / "gone"), 6, "does not exist")
    assert_refused(warm("inspect", "nobody/nothing", cwd=tmp_path), 3, "nobody/nothing is no path", "pass its folder")
