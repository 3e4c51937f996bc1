"""Llama graphs as docs/format.md describes a decoder's, made straight of a torch model's weights in milliseconds."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from artifacts.bundle import Bundle, BundleWriter
from artifacts.manifest import Generation, Manifest, SessionOptions, Source, TensorSpec, TextProcessor, Variant
from artifacts.proof import Proof
from artifacts.signature import STEP_INPUTS, cache_names
from passes.sites import NAME_SCOPES

Arrays = dict[str, NDArray[Any]]
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MODULES = {part: f"{'mlp' if len(part) > 1 else 'self_attn'}.{part}_proj" for part in (*"qkvo", "gate", "up", "down")}
SENTENCES = (
    "the cat sat on the mat",
    "a dog ran after the red ball and the bird flew away",
    "grüße aus köln, 東京 and café",
    "once upon a time there was a little house by the river",
)


def tiny_llama(seed: int = 0, *, vocabulary: int = 300, context: int = 128, layers: int = 2) -> Any:
    """A random LlamaForCausalLM whose next tokens differ enough not to tie."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def llama_specs(config: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of the graph."""
    size = config.hidden_size // config.num_attention_heads
    shape = ("batch", config.num_key_value_heads, "capacity", size)
    pairs = [pair for layer in range(config.num_hidden_layers) for pair in cache_names(layer)]
    inputs = [TensorSpec(*one) for one in STEP_INPUTS] + [TensorSpec(old, "float32", shape) for old, _ in pairs]
    outputs = [TensorSpec("logits", "float32", ("batch", "positions", config.vocab_size))]
    return tuple(inputs), (*outputs, *(TensorSpec(new, "float32", shape) for _, new in pairs))


class _Builder:
    """Nodes and weights of a graph; each method returns the name of what it computes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: Arrays = {}

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, name=name, **attributes))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def norm(self, x: str, name: str, array: NDArray[Any], epsilon: float) -> str:
        return self.op("SimplifiedLayerNormalization", x, self.weight(name, array), axis=-1, epsilon=epsilon)

    def linear(self, x: str, name: str, array: NDArray[Any]) -> str:
        made = self.op("MatMul", x, self.weight(name, array.T))
        layer, _, part = name.rpartition(".")
        self.nodes[-1].metadata_props.add(key=NAME_SCOPES, value=repr(["", f"{layer}.{_MODULES[part]}", "linear"]))
        return made


def llama_graph(model: Any) -> onnx.ModelProto:
    """One graph for prefill and decode of a LlamaForCausalLM, attention as GroupQueryAttention."""
    config = model.config
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    build = _Builder()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": 10000.0}
    angles = np.outer(
        np.arange(config.max_position_embeddings), rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
    ).astype(np.float32)
    cos, sin = build.weight("cos", np.cos(angles)), build.weight("sin", np.sin(angles))
    x = build.op("Gather", build.weight("embed", state["model.embed_tokens.weight"]), "input_ids")
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = build.norm(x, f"{at}n1", state[f"{at}input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (build.linear(h, f"{at}{p}", state[f"{at}self_attn.{p}_proj.weight"]) for p in "qkv")
        q, k = (build.op("RotaryEmbedding", one, "position_ids", cos, sin, domain="com.microsoft") for one in (q, k))
        (old_key, key), (old_value, value) = cache_names(layer)
        attention = helper.make_node(
            "GroupQueryAttention",
            [q, k, v, old_key, old_value, "seqlens_k", "total_sequence_length"],
            [f"{at}attention", key, value],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=size**-0.5,
        )
        build.nodes.append(attention)
        x = build.op("Add", x, build.linear(f"{at}attention", f"{at}o", state[f"{at}self_attn.o_proj.weight"]))
        h = build.norm(x, f"{at}n2", state[f"{at}post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = build.linear(h, f"{at}gate", state[f"{at}mlp.gate_proj.weight"])
        silu = build.op("Mul", gate, build.op("Sigmoid", gate))
        up = build.op("Mul", silu, build.linear(h, f"{at}up", state[f"{at}mlp.up_proj.weight"]))
        x = build.op("Add", x, build.linear(up, f"{at}down", state[f"{at}mlp.down_proj.weight"]))
    x = build.norm(x, "norm", state["model.norm.weight"], config.rms_norm_eps)
    where = build.op("Unsqueeze", "logits_index", build.weight("last", np.array([-1], np.int64)))
    head = build.weight("head", state["lm_head.weight"].T)
    build.op("MatMul", build.op("GatherND", x, where, batch_dims=1), head, out="logits")
    return _model(build, config)


def _model(build: _Builder, config: Any) -> onnx.ModelProto:
    inputs, outputs = (
        [helper.make_tensor_value_info(s.name, TYPES[s.dtype], list(s.shape)) for s in specs]
        for specs in llama_specs(config)
    )
    initializers = [numpy_helper.from_array(array, name) for name, array in build.weights.items()]
    graph = helper.make_graph(build.nodes, "decoder", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def byte_level(path: Path, *, bos: bool = True) -> Path:
    """tokenizer.json: byte-level BPE of 300 tokens with special tokens of chat; ``<s>`` before a text if ``bos``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    return _saved(tokenizer, path, bos=bos)


def byte_fallback(path: Path) -> Path:
    """tokenizer.json: sentencepiece's BPE as Llama 2 has it, unknown characters as tokens of their UTF-8 bytes."""
    words = sorted({character for text in SENTENCES[:2] for character in text.replace(" ", "▁")} | {"▁"})
    names = ["<unk>", *SPECIAL[1:3], *(f"<0x{byte:02X}>" for byte in range(256)), *words, "th", "the", "▁the", "at"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t")]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    return _saved(tokenizer, path, bos=True)


def _saved(tokenizer: Tokenizer, path: Path, *, bos: bool) -> Path:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    return path


def golden_feeds(config: Any, capacity: int = 16) -> Arrays:
    """A ragged prefill of two rows, past buffers included."""
    inputs, _ = llama_specs(config)
    rng = np.random.default_rng(5)
    lengths = np.array([7, 4])
    feeds: Arrays = {
        "input_ids": rng.integers(5, config.vocab_size, (2, 7)),
        "position_ids": np.tile(np.arange(7), (2, 1)),
        "seqlens_k": (lengths - 1).astype(np.int32),
        "total_sequence_length": np.array(7, np.int32),
        "logits_index": (lengths - 1)[:, None],
    }
    feeds["input_ids"][1, 4:] = 0
    for spec in inputs[len(STEP_INPUTS) :]:
        feeds[spec.name] = np.zeros((2, spec.shape[1], capacity, spec.shape[3]), np.float32)
    return feeds


def reference_logits(model: Any, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Logits of the torch model at the places that a prefill asks for, float32 [batch, positions, vocabulary]."""
    import torch

    rows = []
    with torch.no_grad():
        for ids, last, places in zip(feeds["input_ids"], feeds["seqlens_k"], feeds["logits_index"], strict=True):
            logits = model(torch.from_numpy(ids[None, : last + 1])).logits[0].float().numpy()
            rows.append(logits[places])
    return np.stack(rows)


def write_decoder(
    out: Path,
    model: Any,
    tokenizer: Path,
    *,
    template: str = TEMPLATE,
    generation: Mapping[str, Any] | None = None,
    variants: tuple[str, ...] = ("cpu-fp32",),
) -> Bundle:
    """A bundle of the task text-generation of that model, as BundleWriter makes it; golden outputs are torch's."""
    inputs, outputs = llama_specs(model.config)
    feeds = golden_feeds(model.config)
    golden = io.BytesIO()
    arrays = {f"input.{name}": array for name, array in feeds.items()}
    np.savez(golden, **arrays, **{"output.logits": reference_logits(model, feeds)})
    config = model.config
    end = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = (("bos_token", "<s>"), ("eos_token", "</s>"))
    path = "processor/chat_template.jinja" if template else ""
    told = {"eos": tuple(end), "bos": config.bos_token_id, "chat_template": path, "special": special}
    text = TextProcessor("processor/tokenizer.json", config.max_position_embeddings, 0, "<pad>", 0, pairs=False)
    with BundleWriter(out) as writer:
        for name in variants:
            writer.add_bytes(f"{name}.onnx", llama_graph(model).SerializeToString())
        writer.add_bytes("golden.npz", golden.getvalue())
        writer.add_bytes("plan.toml", b"schema = 1\n")
        writer.add_bytes("processor/tokenizer.json", tokenizer.read_bytes())
        if template:
            writer.add_bytes(path, template.encode())
        manifest = Manifest(
            name="tiny",
            task="text-generation",
            source=Source("tiny", "huggingface", "sha256:" + "0" * 64, "LlamaForCausalLM"),
            toolchain=(),
            inputs=inputs,
            outputs=outputs,
            processor=text,
            variants=tuple(
                Variant(name, "cpu", ("CPUExecutionProvider",), f"{name}.onnx", "fp32", "", SessionOptions(), 1e-4, ())
                for name in variants
            ),
            files=(),
            generation=Generation(**(told | dict(generation or {}))),
        )
        return writer.commit(manifest, Proof("sha256:" + "0" * 64, (), ()))


def real_decoder(out: Path, folder: Path) -> Bundle:
    """A bundle of a trained model of the shared data, its own tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stated = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    end = tuple(stated) if isinstance(stated, list) else (stated,)
    return write_decoder(out, model, folder / "tokenizer.json", template="", generation={"eos": end})
