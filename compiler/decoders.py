"""Which language models cannot be compiled, as far as config.json alone tells: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping

_LATENT = "keeps a latent in place of keys and values (multi-head latent attention)"
_RECURRENT = "carries a recurrent state beside the KV cache (state space, linear attention or convolution)"
_ALIBI = "biases attention by distance (ALiBi)"
_MODEL_TYPES = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe_lite"),
            *("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"),
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear"),
            *("lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text"),
            *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_PARTS = ("vision_config", "audio_config", "text_config")
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


def is_language_model(architecture: str) -> bool:
    """Whether a class of transformers is a decoder with a head over its vocabulary, by its name."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def named_refusal(config: Mapping[str, object]) -> str:
    """Why a language model cannot be compiled, told from its config.json.

    Args:
        config: Content of config.json.

    Returns:
        What the model does that a graph of GroupQueryAttention cannot express, to be read after its name; empty where
        the config tells of nothing.
    """
    reasons = (
        _quantized(config),
        "is an encoder-decoder" if config.get("is_encoder_decoder") is True else "",
        "takes images or sound beside text" if any(isinstance(config.get(key), Mapping) for key in _PARTS) else "",
        _ALIBI if config.get("alibi") is True else "",
        _MODEL_TYPES.get(str(config.get("model_type")), ""),
        "shares keys and values between layers" if config.get("num_kv_shared_layers") else "",
        *(_experts(key, config.get(key)) for key in _EXPERTS),
        _kinds(config.get("layer_types")),
    )
    return next((reason for reason in reasons if reason), "")


def _quantized(config: Mapping[str, object]) -> str:
    stated = config.get("quantization_config")
    method = stated.get("quant_method", "unknown method") if isinstance(stated, Mapping) else ""
    return f"has weights quantized already ({method})" if method else ""


def _experts(key: str, count: object) -> str:
    return f"is a mixture of experts ({key} = {count})" if isinstance(count, int) and count > 1 else ""


def _kinds(stated: object) -> str:
    kinds = stated if isinstance(stated, list) else []
    return next((f"has layers of the kind {kind}" for kind in kinds if kind not in _LAYER_TYPES), "")
