"""A Llama or Qwen2 folder as a GGUF file in float16, with a vocabulary of placeholders: for speed, not for text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}


def write_gguf(folder: Path, path: Path) -> None:
    """Write it.

    Raises:
        ValueError: The model is of another type.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = _ARCHITECTURES.get(config["model_type"])
    if kind is None:
        raise ValueError(f"{config['model_type']} is not written as GGUF here")
    writer = gguf.GGUFWriter(path, kind)
    _describe(writer, config, gguf)
    for name, array in _tensors(folder):
        place, _, part = name.rpartition(".")
        if place.startswith("model.layers."):
            number, inner = place.removeprefix("model.layers.").split(".", 1)
            if kind == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                array = _interleave(array, config, inner)  # noqa: PLW2901
            target = f"blk.{number}.{_NAMES[inner]}.{part}"
        else:
            target = f"{_TOP[place]}.{part}"
        writer.add_tensor(target, array.astype(np.float16 if array.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any], gguf: Any) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    tokens = [f"<{index}>" for index in range(config["vocab_size"])]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))


def _interleave(array: NDArray[Any], config: dict[str, Any], inner: str) -> NDArray[Any]:
    """llama.cpp rotates neighbouring channels where transformers rotates halves."""
    heads = config["num_attention_heads"]
    heads = config.get("num_key_value_heads", heads) if inner.endswith("k_proj") else heads
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def _tensors(folder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
