"""Tiny language models with random weights, one for each architecture, and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

VOCABULARY = 300
CONTEXT = 64
SPECIAL = ("<s>", "</s>", "<pad>")
TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 48}
_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Llama 3": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "Llama dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "Llama narrow heads": ("LlamaForCausalLM", {"head_dim": 6}),
    "Llama one head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "Ministral": ("MinistralForCausalLM", {**_KINDS}),
    "Ministral 3": ("Ministral3ForCausalLM", {}),
    "Qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 4}),
    "Qwen2 window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "Qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "Phi": ("PhiForCausalLM", {"num_key_value_heads": 4, "hidden_size": 64, "partial_rotary_factor": 0.5}),
    "Phi-3": ("Phi3ForCausalLM", {"sliding_window": 7}),
    "Phi-3 long": (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 5.0, 9.0],
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "Gemma": ("GemmaForCausalLM", {}),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        {**_KINDS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    ),
    "Gemma 3": ("Gemma3ForCausalLM", {**_KINDS, "query_pre_attn_scalar": 16}),
    "VaultGemma": ("VaultGemmaForCausalLM", {**_KINDS}),
    "SmolLM3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "Olmo": ("OlmoForCausalLM", {"clip_qkv": 1.0}),
    "Olmo2": ("Olmo2ForCausalLM", {}),
    "Olmo3": ("Olmo3ForCausalLM", {**_KINDS}),
    "Granite": (
        "GraniteForCausalLM",
        {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    ),
    "Granite window": ("GraniteSWAForCausalLM", {**_KINDS}),
    "StableLM": (
        "StableLmForCausalLM",
        {"head_dim": 16, "hidden_size": 64, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    ),
    "Starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 7}),
    "Cohere": ("CohereForCausalLM", {"use_qk_norm": True, "logit_scale": 0.5}),
    "Cohere2": ("Cohere2ForCausalLM", {**_KINDS}),
    "GPT-2": ("GPT2LMHeadModel", _GPT2),
    "GPT-2 by layer": ("GPT2LMHeadModel", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": True}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"head_dim": 16, "hidden_size": 64, "rotary_pct": 0.5}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["local", "global"], 1]], "window_size": 7},
    ),
    "GPT-J": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Apertus": ("ApertusForCausalLM", {}),
    "Arcee": ("ArceeForCausalLM", {}),
    "BioGPT": ("BioGptForCausalLM", {}),
    "CTRL": ("CTRLLMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "dff": 48}),
    "CWM": ("CwmForCausalLM", {**_KINDS}),
    "Ernie 4.5": ("Ernie4_5ForCausalLM", {}),
    "EXAONE 4": ("Exaone4ForCausalLM", {**_KINDS}),
    "GLM": ("GlmForCausalLM", {}),
    "GLM-4": ("Glm4ForCausalLM", {}),
    "Helium": ("HeliumForCausalLM", {}),
    "Hunyuan": ("HunYuanDenseV1ForCausalLM", {}),
    "HyperCLOVA X": ("HyperCLOVAXForCausalLM", {}),
    "Jais 2": ("Jais2ForCausalLM", {}),
    "ModernBERT decoder": ("ModernBertDecoderForCausalLM", {**_KINDS}),
    "NanoChat": ("NanoChatForCausalLM", {"final_logit_softcapping": 3.0}),
    "Nemotron": ("NemotronForCausalLM", {"head_dim": 16, "hidden_size": 64, "partial_rotary_factor": 0.5}),
    "Persimmon": ("PersimmonForCausalLM", {"head_dim": 16, "hidden_size": 64}),
    "Seed-OSS": ("SeedOssForCausalLM", {}),
    "Moshi": ("MoshiForCausalLM", {}),
}
"""Name -> class in transformers, and what its config has beside the common sizes."""


def write_decoder(folder: Path, name: str = "Llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A folder with config.json, generation_config.json, model.safetensors, a tokenizer and a chat template."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    architecture, options = ARCHITECTURES[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**{**_SIZE, **options, **overrides})).eval()
    _spread(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Byte-level: ids 0 to 2 are `SPECIAL`, each byte is one id. ``<s>`` is put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _spread(model: Any) -> None:
    """Weights wide enough that attention is uneven, so that a wrong mask shows."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.5 if "embed" in name else 0.25)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(1.0, 0.1)


class Decoder:
    """An exported graph in ONNX Runtime, past and present bound to the same buffers.

    Attributes:
        lengths: Tokens of each row so far.
    """

    def __init__(self, exported: Any, folder: Path, rows: int, capacity: int) -> None:
        path = folder / "decoder.onnx"
        ir.save(exported.model, path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        past = [spec for spec in exported.inputs if spec.name.startswith("past_key_values.")]
        present = [spec.name for spec in exported.outputs[1:]]
        zeros = [np.zeros((rows, spec.shape[1], capacity, spec.shape[3]), np.float32) for spec in past]
        buffers = map(ort.OrtValue.ortvalue_from_numpy, zeros)
        self._buffers = list(zip((spec.name for spec in past), present, buffers, strict=True))
        self.lengths = np.zeros(rows, np.int64)

    def prefill(self, prompts: list[list[int]], index: Any) -> NDArray[np.float32]:
        """Logits ``[rows, positions, vocabulary]`` at ``index [rows, positions]`` of the prompts."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        width = int(self.lengths.max())
        ids = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        positions = np.tile(np.arange(width), (len(prompts), 1))
        return self._run(ids, positions, self.lengths - 1, width, index)

    def decode(self, tokens: Any) -> NDArray[np.float32]:
        """Logits ``[rows, vocabulary]`` after one more token of each row."""
        rows = len(tokens)
        logits = self._run(
            np.asarray(tokens).reshape(rows, 1),
            self.lengths.reshape(rows, 1),
            self.lengths,
            self.lengths.max() + 1,
            np.zeros((rows, 1), int),
        )
        self.lengths = self.lengths + 1
        return logits[:, 0]

    def _run(self, ids: Any, positions: Any, seqlens: Any, total: Any, index: Any) -> NDArray[np.float32]:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.asarray(ids, np.int64))
        binding.bind_cpu_input("position_ids", np.asarray(positions, np.int64))
        binding.bind_cpu_input("seqlens_k", np.asarray(seqlens, np.int32))
        binding.bind_cpu_input("total_sequence_length", np.asarray(total, np.int32))
        binding.bind_cpu_input("logits_index", np.asarray(index, np.int64))
        for past, present, buffer in self._buffers:
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()
