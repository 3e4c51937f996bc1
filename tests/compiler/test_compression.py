"""What a user asks to take out of a model, as passes; and where in a recipe they run."""

from __future__ import annotations

import pytest

from artifacts.errors import UsageError
from artifacts.target import TARGETS
from compiler.compression import Compression, form, split
from compiler.recipe import BUILT_IN, load_recipe
from compiler.tasks import GENERATION
from passes.fusion import UnfuseAttention
from passes.pipeline import parse
from passes.registry import CLEAN


@pytest.mark.parametrize(("wish", "passes"), [
    ({}, ""),
    ({"prune": "50%"}, "prune(ratio=0.5); repair"),
    ({"prune": "0.3", "repair": False}, "prune(ratio=0.3)"),
    ({"prune": "2:4"}, "prune(pattern=2:4); repair"),
    (
        {"prune": "2:4,embeddings=40%", "repair": False},
        "prune(pattern=2:4); prune(ratio=0.4, method=magnitude, only=[*embed*, *wte*, *wpe*])",
    ),
    ({"rank": "60%"}, "factor(ratio=0.6); repair"),
    ({"share": "2%"}, "share-weights(tolerance=0.02); repair"),
    ({"convolutions": "tucker=50%"}, "factor-convolutions(method=tucker, flops=0.5); repair"),
    ({"prune_structure": "ffn=25%,layers=2"}, "prune-layers(count=2); prune-neurons(ratio=0.25); repair"),
    ({"prune_structure": "heads=25%", "repair": False}, "prune-heads(ratio=0.25, repair=false)"),
    (
        {"prune_structure": "heads=25%", "rank": "80%", "prune": "2:4"},
        "prune-heads(ratio=0.25); factor(ratio=0.8); prune(pattern=2:4); repair",
    ),
])  # fmt: skip
def test_each_wish_is_passes_in_the_order_they_build_on_each_other(wish, passes):
    compression = Compression(**wish)
    assert compression.pipeline() == parse(passes)
    assert bool(compression) == bool(passes)


@pytest.mark.parametrize(("wish", "what"), [
    ({"prune": "100%"}, "--prune 100% is not between"),
    ({"prune": "0"}, "--prune 0 is not between"),
    ({"prune": "-5%"}, "--prune -5% is not between"),
    ({"prune": "nan"}, "--prune nan is not between"),
    ({"prune": "half"}, "--prune 'half' is no share"),
    ({"prune": "2:x"}, "--prune '2:x' is no pattern"),
    ({"prune": "50%,heads=2%"}, "--prune knows no 'heads'"),
    ({"prune": "4:2"}, "pass 'prune' refuses its options"),
    ({"rank": "all"}, "--rank 'all' is no share"),
    ({"prune_structure": "arms=25%"}, "--prune-structure knows no 'arms'"),
    ({"prune_structure": "ffn"}, "--prune-structure 'ffn' cannot be read"),
    ({"prune_structure": "ffn=25%,ffn=30%"}, "--prune-structure names ffn twice"),
    ({"convolutions": "tucker=50%,spatial=50%"}, "names several ways"),
    ({"convolutions": "fft=50%"}, "--convolutions knows no 'fft'"),
    ({"share": "2%", "prune": "50%"}, "contradict"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(wish, what):
    with pytest.raises(UsageError) as raised:
        Compression(**wish).pipeline()
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("task", ["", GENERATION])
def test_compression_acts_on_a_clean_graph_before_anything_is_packed_or_quantized(name, target, task):
    recipe = load_recipe(name)
    if not (recipe.generation if task else recipe.stages):
        pytest.skip("the recipe is not for it")
    stages = recipe.stages_for(target, task)
    forming, rest = split(stages)
    assert forming + rest == stages
    done = [one.name for stage in forming for alternative in stage for one in alternative.passes]
    assert set(done) <= {one.name for one in (*CLEAN, UnfuseAttention())}
    assert not {one.name for one in form(task, target).passes} & {"pack-products", "pack-attention", "unfuse-attention"}
