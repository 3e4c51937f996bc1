"""What is taken out of a model by name: each option and pairs of them by the real command, on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from convolution_graphs import images, residual_network
from onnx import TensorProto, helper, numpy_helper
from real_command import assert_refused, listing, ok, warm
from tiny_decoders import write_decoder
from tiny_models import vocabulary, write_sentence_model

from artifacts.bundle import Bundle, open_bundle
from passes.affine import matrix_of
from passes.pipeline import parse
from passes.sites import convolution_sites, linear_sites

ANY = ("--max-drop", "99%")
"""Random weights say nothing: the budget has tests of its own."""
TEXT = "a dog runs in the park"
SHAPE = (len(vocabulary()), 32)
"""Of the encoder's words."""
HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 8, 4
"""Of the decoder."""


@dataclass(frozen=True)
class Given:
    """A source, what `hasten compile` needs besides, and what `hasten run` takes."""

    source: Path
    data: tuple[str | Path, ...]
    run: tuple[str | Path, ...]


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Given]:
    """An encoder of two layers, a decoder of four with two KV heads, a convolutional network and an MLP."""
    root = tmp_path_factory.mktemp("dense")
    ir.save(residual_network(width=32, size=8, classes=32), root / "cnn.onnx")
    pictures = images(1, 300)
    np.savez(root / "images.npz", **pictures)
    write_layers(root / "mlp.onnx")
    rows = np.random.default_rng(1).standard_normal((300, 64)).astype(np.float32)
    np.savez(root / "rows.npz", x=rows)
    (root / "image.jsonl").write_text(json.dumps({"image": pictures["image"][:1].tolist()}))
    (root / "row.jsonl").write_text(json.dumps({"x": rows[:1].tolist()}))
    return {
        "encoder": Given(write_sentence_model(root / "encoder"), (), (TEXT,)),
        "decoder": Given(
            write_decoder(root / "decoder", num_hidden_layers=LAYERS), (), ("--prompt", TEXT, "--max-new-tokens", "6")
        ),
        "cnn": Given(root / "cnn.onnx", ("--data", root / "images.npz"), ("--input", root / "image.jsonl")),
        "mlp": Given(root / "mlp.onnx", ("--data", root / "rows.npz"), ("--input", root / "row.jsonl")),
    }


def write_layers(path: Path) -> Path:
    """64 -> 64 -> 64 -> 32 with ReLUs; the first two weights are nearly the same."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((64, 64)) / 6
    weights = {
        "first": first,
        "second": first + generator.standard_normal((64, 64)) / 600,
        "third": generator.standard_normal((64, 32)) / 6,
    }
    nodes, value = [], "x"
    for name in weights:
        nodes.append(helper.make_node("MatMul", [value, name], [f"{name}.product"], f"{name}.matmul"))
        nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [f"{name}.sum"], f"{name}.add"))
        nodes.append(helper.make_node("Relu", [f"{name}.sum"], [f"{name}.relu"], f"{name}.relu"))
        value = f"{name}.relu"
    nodes[-1] = helper.make_node("Identity", ["third.sum"], ["y"], "last")
    biases = {f"{name}.bias": generator.standard_normal(weight.shape[1]) / 4 for name, weight in weights.items()}
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in (weights | biases).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def compiled(given: Given, out: Path, *options: str | Path, recipe: str = "reference") -> Bundle:
    """The bundle, which is whole and runs."""
    done = ok(warm("compile", given.source, "-o", out, "--recipe", recipe, *given.data, *ANY, *options, "--quiet"))
    assert (done.out, done.err) == ("", "")
    ok(warm("verify", out))
    answer = ok(warm("run", out, *given.run))
    assert answer.out
    assert "nan" not in answer.out.lower()
    return open_bundle(out)


def replayed(given: Given, bundle: Bundle, *options: str | Path) -> None:
    """The plan makes the same bytes again."""
    out = bundle.path.with_name("replayed")
    ok(warm("compile", given.source, "-o", out, "--plan", bundle.path, *given.data, *ANY, *options, "--quiet"))
    assert open_bundle(out).digest == bundle.digest


def graph_of(bundle: Bundle) -> ir.Model:
    (variant,) = bundle.manifest.variants
    return ir.load(bundle.path / variant.model)


def passes_of(bundle: Bundle) -> list[str]:
    """Names of the passes that made the variant."""
    return [one.name for one in parse(bundle.manifest.variants[0].pipeline).passes]


def products(bundle: Bundle) -> list[np.ndarray]:
    """The float32 weights of linear operators ``[K, N]``, in graph order."""
    return [matrix_of(site) for site in linear_sites(graph_of(bundle))]


def operators(bundle: Bundle) -> set[str]:
    return {node.op_type for node in graph_of(bundle).graph}


def zeros(weight: np.ndarray) -> float:
    return float(np.mean(weight == 0.0))


def kernels(bundle: Bundle) -> list[tuple[int, ...]]:
    return [tuple(int(extent) for extent in site.weight.shape or ()) for site in convolution_sites(graph_of(bundle))]


# Each option alone ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_of_the_weights_become_zeros(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["encoder"], tmp_path / "bundle", "--prune", "50%")
    weights = products(bundle)
    assert len(weights) == 12
    assert all(0.45 < zeros(weight) < 0.55 for weight in weights)
    assert {"prune", "repair"} <= set(passes_of(bundle))
    replayed(given["encoder"], bundle)


@pytest.mark.slow
def test_rows_of_embeddings_become_zeros_where_they_are_named(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["encoder"], tmp_path / "bundle", "--prune", "50%,embeddings=25%")
    tensors = [value.const_value for value in graph_of(bundle).graph.initializers.values()]
    (words,) = (tensor.numpy() for tensor in tensors if tensor is not None and tuple(tensor.shape) == SHAPE)
    assert 0.2 < zeros(words) < 0.3
    assert all(0.45 < zeros(weight) < 0.55 for weight in products(bundle))


def test_two_of_four(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["mlp"], tmp_path / "bundle", "--prune", "2:4", "--no-repair")
    weights = products(bundle)
    assert [weight.shape for weight in weights] == [(64, 64), (64, 64), (64, 32)]
    for weight in weights:
        assert (np.count_nonzero(weight.reshape(16, 4, -1), axis=1) <= 2).all()
    assert "repair" not in passes_of(bundle)
    replayed(given["mlp"], bundle)


@pytest.mark.slow
@pytest.mark.parametrize("repair", [True, False])
def test_heads_and_neurons_go(given: dict[str, Given], tmp_path: Path, repair: bool) -> None:
    options = () if repair else ("--no-repair",)
    bundle = compiled(
        given["encoder"], tmp_path / "bundle", "--prune-structure", "heads=25%,ffn=25%", *options, recipe="safe"
    )
    weights = {value.name: value.const_value for value in graph_of(bundle).graph.initializers.values()}
    behind = sum(tensor.shape[0] for name, tensor in weights.items() if name.endswith("output.dense.weight"))
    # Of 2 x 32 channels behind attention and 2 x 64 behind an activation.
    assert behind == 48 + 96
    pipeline = bundle.manifest.variants[0].pipeline
    assert ("prune-heads(ratio=0.25)" in pipeline) == repair
    assert ("prune-heads(ratio=0.25, repair=false)" in pipeline) != repair


def test_ranks(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["mlp"], tmp_path / "bundle", "--rank", "60%")
    weights = products(bundle)
    dense = 64 * 64 * 2 + 64 * 32
    assert len(weights) > 3
    assert sum(weight.size for weight in weights) <= 0.6 * dense
    assert all(min(weight.shape) % 16 == 0 for weight in weights)
    replayed(given["mlp"], bundle)


def test_weights_are_shared(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["mlp"], tmp_path / "bundle", "--share", "5%")
    sites = linear_sites(graph_of(bundle))
    assert len(sites) == 3
    assert len({site.weight for site in sites}) == 2
    replayed(given["mlp"], bundle)


def test_channels_go(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["cnn"], tmp_path / "bundle", "--prune-structure", "channels=50%")
    assert {shape[0] for shape in kernels(bundle)} == {16, 32}
    assert products(bundle)[0].shape == (32, 32)
    replayed(given["cnn"], bundle)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["separable", "tucker", "spatial"])
def test_convolutions_are_split(given: dict[str, Given], tmp_path: Path, way: str) -> None:
    bundle = compiled(given["cnn"], tmp_path / "bundle", "--convolutions", f"{way}=60%")
    shapes = kernels(bundle)
    assert len(shapes) > 6
    sizes = {shape[2:] for shape in shapes}
    assert sizes == ({(3, 3), (1, 1), (3, 1), (1, 3)} if way == "spatial" else {(3, 3), (1, 1)})
    if way == "separable":
        assert any(shape[1] == 1 for shape in shapes)
    replayed(given["cnn"], bundle)


@pytest.mark.slow
def test_layers_and_kv_heads_of_a_decoder_go(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["decoder"], tmp_path / "bundle", "--prune-structure", "layers=1,kv-heads=50%")
    (variant,) = bundle.manifest.variants
    assert variant.cache is not None
    assert [spec.shape[1] for spec in variant.cache] == [1] * 2 * (LAYERS - 1)
    assert len(bundle.manifest.inputs) - len(variant.cache) == 5 + 2
    attentions = [node for node in graph_of(bundle).graph if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == LAYERS - 1
    assert {node.attributes["num_heads"].as_int() for node in attentions} == {HEADS // 2}
    replayed(given["decoder"], bundle)


@pytest.mark.slow
def test_heads_of_a_decoder_go_and_its_cache_stays(given: dict[str, Given], tmp_path: Path) -> None:
    bundle = compiled(given["decoder"], tmp_path / "bundle", "--prune-structure", "heads=50%,ffn=50%")
    (variant,) = bundle.manifest.variants
    assert variant.cache is None
    attentions = [node for node in graph_of(bundle).graph if node.op_type == "GroupQueryAttention"]
    assert {node.attributes["num_heads"].as_int() for node in attentions} == {KV_HEADS}
    assert {node.attributes["kv_num_heads"].as_int() for node in attentions} == {KV_HEADS}
    assert sum(weight.shape[1] for weight in products(bundle) if weight.shape[0] == 32) > 0


@pytest.mark.slow
def test_a_vocabulary(given: dict[str, Given], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(f"{TEXT}\nthe cat is red\n")
    source, tokens = given["encoder"].source, tmp_path / "tokens.txt"
    said = ok(warm("vocabulary", source, "--text", tmp_path / "texts.txt", "-o", tokens)).out
    words = tokens.read_text().split()
    assert {"a", "dog", "in", "the", "park", "cat", "is", "red"} < set(words)
    assert said.startswith(f"{tokens}: {len(words)} tokens")
    done = warm("compile", source, "-o", tmp_path / "bundle", "-r", "reference", "--vocabulary", tokens, "--json")
    notes = ok(done).document["notes"]
    assert any(f"of {len(vocabulary()):,} tokens: {len(words)} of tokens.txt" in note for note in notes), notes
    bundle = open_bundle(tmp_path / "bundle")
    whole = compiled(given["encoder"], tmp_path / "whole")
    rows = min(extents_of_tables(bundle))
    assert len(words) + 5 <= rows < len(vocabulary())
    vectors = [json.loads(ok(warm("run", one.path, "the cat is red")).out)["embedding"] for one in (bundle, whole)]
    np.testing.assert_allclose(*vectors, rtol=0, atol=1e-5)
    replayed(given["encoder"], bundle, "--vocabulary", tokens)
    other = tmp_path / "other.txt"
    other.write_text("the\ncat\n")
    refused = warm("compile", source, "-o", tmp_path / "no", "--plan", bundle.path, "--vocabulary", other, "--quiet")
    assert_refused(refused, 2, "the plan was made with another vocabulary")


def extents_of_tables(bundle: Bundle) -> list[int]:
    """Rows of what Gathers by tokens read."""
    return [
        int(node.inputs[0].shape[0])
        for node in graph_of(bundle).graph
        if node.op_type == "Gather" and node.inputs[0].shape is not None and len(node.inputs[0].shape) == 2
        and node.inputs[0].shape[0] > 4
    ]  # fmt: skip


@pytest.mark.slow
def test_a_vocabulary_of_a_decoder(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "decoder")
    merges = ["t h", "th e", "Ġ the", "d o", "do g", "Ġ dog", "c a", "ca t", "Ġ cat"]
    content = json.loads((source / "tokenizer.json").read_text())
    tokens = content["model"]["vocab"]
    before = len(tokens)
    for merge in merges:
        tokens[merge.replace(" ", "")] = len(tokens)
    content["model"]["merges"] = [merge.split() for merge in merges]
    (source / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "texts.txt").write_text("a dog\n")
    file = tmp_path / "tokens.json"
    ok(warm("vocabulary", source, "--text", tmp_path / "texts.txt", "-o", file))
    assert set(json.loads(file.read_text())) == {"a", "Ġdog"}
    decoder = Given(source, (), ("--prompt", "the dog", "--max-new-tokens", "6"))
    bundle = compiled(decoder, tmp_path / "bundle", "--vocabulary", file)
    # All bytes stay, so that any text can be written, and what "Ġdog" is merged from.
    assert products(bundle)[-1].shape == (32, before + 3)
    replayed(decoder, bundle, "--vocabulary", file)


# Pairs ------------------------------------------------------------------------------------------------------------

WISHES = {
    "prune": ("--prune", "50%"),
    "structure": ("--prune-structure", "kv-heads=50%,ffn=25%"),
    "rank": ("--rank", "60%"),
}
ACTS = {"prune": "prune", "structure": "prune-kv-heads", "rank": "factor"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4", "balanced"])
@pytest.mark.parametrize("wish", WISHES)
def test_a_decoder_in_few_bits(given: dict[str, Given], tmp_path: Path, wish: str, recipe: str) -> None:
    bundle = compiled(given["decoder"], tmp_path / "bundle", *WISHES[wish], recipe=recipe)
    (variant,) = bundle.manifest.variants
    assert ACTS[wish] in passes_of(bundle)
    assert (variant.cache is not None) == (wish == "structure")
    if recipe != "balanced":  # there the clock decides
        assert variant.precision == recipe
        assert "MatMulNBits" in operators(bundle)
    if recipe == "int8":
        check_codes(bundle, wish)
        replayed(given["decoder"], bundle)


def check_codes(bundle: Bundle, wish: str) -> None:
    """Half of the codes of the layers stand for zero where half was pruned; thin products where there are factors."""
    graph = graph_of(bundle).graph
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    for node in nodes:
        if wish == "prune" and node.attributes["N"].as_int() < 200:  # not the head
            rows = node.attributes["K"].as_int()
            tensor = node.inputs[1].const_value
            assert tensor is not None
            codes = tensor.numpy().reshape(node.attributes["N"].as_int(), -1)[:, :rows]
            assert 0.45 < np.mean(codes == 128) < 0.6
    thin = [node for node in nodes if node.attributes["N"].as_int() <= 16]
    assert bool(thin) == (wish == "rank") or wish == "structure"


@pytest.mark.slow
@pytest.mark.parametrize("wish", ["prune", "structure", "rank"])
def test_an_encoder_in_int8(given: dict[str, Given], tmp_path: Path, wish: str) -> None:
    options = ("--prune-structure", "heads=25%,ffn=25%") if wish == "structure" else WISHES[wish]
    options = ("--rank", "80%") if wish == "rank" else options
    bundle = compiled(given["encoder"], tmp_path / "bundle", *options, recipe="balanced")
    assert {"prune": "prune", "structure": "prune-heads", "rank": "factor"}[wish] in passes_of(bundle)
    replayed(given["encoder"], bundle)


@pytest.mark.parametrize(("options", "passes"), [
    (("--prune", "50%", "--prune-structure", "ffn=25%"), ("prune-neurons", "prune")),
    (("--rank", "80%", "--prune-structure", "ffn=25%"), ("prune-neurons", "factor")),
    (("--rank", "80%", "--prune", "2:4"), ("factor", "prune")),
])  # fmt: skip
def test_pairs_of_wishes(
    given: dict[str, Given], tmp_path: Path, options: Sequence[str], passes: tuple[str, ...]
) -> None:
    bundle = compiled(given["mlp"], tmp_path / "bundle", *options)
    names = [name for name in passes_of(bundle) if name in (*passes, "repair")]
    assert names == [*passes, "repair"]
    weights = products(bundle)
    if "prune" in passes:
        assert all(zeros(weight) >= 0.45 for weight in weights)
    if "prune-neurons" in passes:
        assert sum(weight.shape[1] for weight in weights if weight.shape[1] > 16) < 128
    replayed(given["mlp"], bundle)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--convolutions", "tucker=60%", "--prune-structure", "channels=50%"),
    ("--convolutions", "separable=60%", "--prune", "50%"),
    ("--convolutions", "spatial=60%", "--rank", "80%"),
])  # fmt: skip
def test_pairs_of_wishes_about_convolutions(given: dict[str, Given], tmp_path: Path, options: Sequence[str]) -> None:
    bundle = compiled(given["cnn"], tmp_path / "bundle", *options)
    assert len(kernels(bundle)) > 6
    replayed(given["cnn"], bundle)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "says"), [
    (("--prune", "50%", "--share", "2%"), "--share and --prune contradict each other"),
    (("--convolutions", "tucker=50%,spatial=50%"), "names several ways"),
    (("--prune", "100%"), "--prune 100% is not between 0% and 100%"),
    (("--prune", "4:2"), "4:2"),
    (("--prune", "2:"), "is no pattern"),
    (("--rank", "0"), "--rank 0 is not between"),
    (("--share", "-1%"), "--share -1% is not between"),
    (("--prune-structure", "heads=0"), "--heads 0 is not between"),
    (("--prune-structure", "layers=x"), "--layers 'x' is no share"),
    (("--prune-structure", "layers=0"), "layers=0 removes nothing"),
    (("--prune-structure", "legs=10%"), "--prune-structure knows no 'legs'"),
    (("--prune-structure", "heads"), "cannot be read"),
    (("--convolutions", "fft=50%"), "--convolutions knows no 'fft'"),
    (("--no-repair",), "--no-repair"),
])  # fmt: skip
def test_options_that_make_no_sense(given: dict[str, Given], tmp_path: Path, options: Sequence[str], says: str) -> None:
    done = warm("compile", given["mlp"].source, "-o", tmp_path / "bundle", "-r", "reference", *options)
    assert_refused(done, 2, says)
    assert listing(tmp_path) == {}


def test_a_plan_and_a_wish(given: dict[str, Given], mlp_bundle: Path, tmp_path: Path) -> None:
    done = warm("compile", given["mlp"].source, "-o", tmp_path / "b", "--plan", mlp_bundle, "--prune", "50%")
    assert_refused(done, 2, "a plan says itself what is taken out of a model")


@pytest.mark.parametrize(("name", "options", "says"), [
    ("mlp", ("--prune-structure", "heads=25%"), "finds nothing to act on: there is no attention"),
    ("mlp", ("--prune-structure", "layers=1"), "finds nothing to act on: there are 0 attention operators"),
    ("mlp", ("--prune-structure", "channels=25%"), "prune-channels finds nothing to act on"),
    ("mlp", ("--convolutions", "tucker=50%"), "finds nothing to act on: there is no convolution"),
    ("mlp", ("--share", "0.001%"), "finds nothing to act on: no two weights are within"),
    ("cnn", ("--prune-structure", "ffn=25%"), "finds nothing to act on: there is no product"),
    ("encoder", ("--prune-structure", "layers=2"), "prune-layers(count=2) finds nothing to act on: 2 of 2 blocks"),
    ("encoder", ("--prune-structure", "kv-heads=50%"), "prune-kv-heads finds nothing to act on"),
])  # fmt: skip
def test_nothing_to_act_on(
    given: dict[str, Given], tmp_path: Path, name: str, options: Sequence[str], says: str
) -> None:
    one = given[name]
    done = warm("compile", one.source, "-o", tmp_path / "bundle", "-r", "reference", *one.data, *ANY, *options)
    assert_refused(done, 3, says)
    assert "left alone :" not in done.err
    assert listing(tmp_path) == {}


def test_a_wish_that_misses_the_budget(given: dict[str, Given], tmp_path: Path) -> None:
    one, out = given["mlp"], tmp_path / "bundle"
    compiled(one, out)
    before = listing(tmp_path)
    words = ("compile", one.source, "-o", out, "-r", "reference", *one.data, "--max-drop", "0.01%")
    assert_refused(warm(*words, "--prune", "50%"), 7, "prune", "misses the quality budget", "--max-drop")
    assert listing(tmp_path) == before


def test_without_examples(given: dict[str, Given], tmp_path: Path) -> None:
    words = ("compile", given["mlp"].source, "-o", tmp_path / "bundle", "-r", "reference", *ANY)
    done = warm(*words, "--prune", "50%")
    assert_refused(done, 2, "fitted to examples", "--data")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(("name", "content", "says"), [
    ("gone.txt", None, "cannot be read"),
    ("empty.txt", b"\n\n", "names no token"),
    ("unknown.txt", b"the\nxyzzy\nplugh\n", "names 'xyzzy' and 1 more, which the model's tokenizer does not have"),
    ("latin.txt", b"caf\xe9\n", "is not UTF-8"),
    ("bad.json", b"{", "is not JSON"),
    ("number.json", b"[1]", "is no JSON list of tokens"),
])  # fmt: skip
def test_lists_of_tokens_that_are_none(
    given: dict[str, Given], tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = listing(tmp_path)
    out = tmp_path / "bundle"
    done = warm("compile", given["encoder"].source, "-o", out, "-r", "reference", "--vocabulary", tmp_path / name)
    assert_refused(done, 2, says)
    assert listing(tmp_path) == before


def test_a_list_of_all_tokens_trims_nothing(given: dict[str, Given], tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("".join(f"{word}\n" for word in vocabulary()))
    out = tmp_path / "bundle"
    words = ("compile", given["encoder"].source, "-o", out, "-r", "reference", "--vocabulary", tmp_path / "all.txt")
    notes = ok(warm(*words, "--json")).document["notes"]
    assert any("all.txt keeps all" in note for note in notes), notes


def test_tensors_have_no_vocabulary(given: dict[str, Given], tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("the\n")
    words = ("compile", given["mlp"].source, "-o", tmp_path / "bundle", "-r", "reference")
    done = warm(*words, *given["mlp"].data, "--vocabulary", tmp_path / "tokens.txt")
    assert_refused(done, 2, "takes tensors and has no vocabulary")


def test_words_that_make_no_list(given: dict[str, Given], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the cat\n")
    source = given["encoder"].source
    done = warm("vocabulary", source, "--text", tmp_path / "gone.txt", "-o", tmp_path / "tokens.txt")
    assert_refused(done, 4, "gone.txt")
    done = warm("vocabulary", source, "--text", tmp_path / "texts.txt", "-o", tmp_path / "no" / "tokens.txt")
    assert_refused(done, 5, "cannot be written")
    done = warm("vocabulary", given["mlp"].source, "--text", tmp_path / "texts.txt", "-o", tmp_path / "tokens.txt")
    assert done.code in (2, 3)
    assert_refused(done, done.code)
