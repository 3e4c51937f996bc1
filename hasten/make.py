"""Commands that make bundles: compile, recipes, passes, prove."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import click
from rich.table import Table
from rich.text import Text

from artifacts.errors import ProviderError
from artifacts.target import TARGETS

from .show import THREADS, console, progress, proof_table, size_text


class Percentage(click.ParamType[float]):
    """``0.5%`` or ``0.005``: a share of at most ten times: a perplexity can more than double."""

    name = "percentage"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
        except ValueError:
            self.fail(f"{text!r} is no percentage; write 0.5% or 0.005", param, ctx)
        if not 0.0 <= share <= 10.0:
            self.fail(f"{text} is not between 0% and 1000%", param, ctx)
        return share


class Size(click.ParamType[int]):
    """``512MB``, ``1.5GB`` or a number of bytes."""

    name = "size"
    _UNITS: ClassVar[dict[str, int]] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        unit = self._UNITS.get(match.group(2).upper(), 0 if match.group(2) else 1) if match else 0
        size = int(float(match.group(1)) * unit) if match else 0
        if not size:
            self.fail(f"{value!r} is no size; write 512MB, 1.5GB or a number of bytes", param, ctx)
        return size


@click.command("compile", short_help="Compile a model into a bundle.")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    default=("cpu",),
    show_default=True,
    type=click.Choice([*(target.name for target in TARGETS), "auto"]),
    help="What to compile for; repeatable: variants share their weights. auto: all that work here.",
)
@click.option(
    "-r",
    "--recipe",
    default="balanced",
    show_default=True,
    help="Name (see `hasten recipes`) or .toml file. int8, int4, int4-fast, int4-serve: the precision of a decoder.",
)
@click.option("--task", help="What the model does; by default what its architecture says.")
@click.option("--pooling", type=click.Choice(["mean", "cls", "max", "none"]), help="How token vectors become one.")
@click.option("--name", help="Name of the model in the bundle.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Examples to calibrate with and to judge by: jsonl, csv, tsv, txt (for decoders running text); npz tensors.",
)
@click.option("--columns", help="Columns of --data, by name or number: text=0,pair=1,label=2.")
@click.option("--max-drop", type=Percentage(), help="Largest loss of quality allowed.  [default: 1%]")
@click.option(
    "--prune",
    default="",
    metavar="SHARE|N:M",
    help="Weights that become 0: 50%, or 2:4 (two of every four); 50%,embeddings=50% prunes embeddings too.",
)
@click.option(
    "--prune-structure",
    default="",
    metavar="NAME=SHARE,…",
    help="Parts that go, and shapes shrink: ffn=25%,heads=25%; also layers (or how many), kv-heads, channels.",
)
@click.option(
    "--rank", default="", metavar="SHARE", help="Split products in two of low rank, of so many of their weights: 60%."
)
@click.option(
    "--convolutions",
    default="",
    metavar="WAY=SHARE",
    help="Split k × k convolutions, keeping so much of their work: separable=50%, tucker=50% or spatial=50%.",
)
@click.option("--share", default="", metavar="SHARE", help="Keep one of weights that differ by less than this: 2%.")
@click.option("--no-repair", is_flag=True, help="Do not fit what remains to what the original computes.")
@click.option(
    "--vocabulary",
    type=click.Path(path_type=Path),
    help="Keep only the tokens of this list, and those that they need; `hasten vocabulary` makes one.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the held-out sample.")
@click.option("--threads", type=THREADS, help="Threads to measure with.  [default: physical cores]")
@click.option(
    "--calibration-rows",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Rows of --data to learn the ranges of activations from; never those that fidelity is judged on. "
    "For decoders windows of 512 tokens, at most 128.",
)
@click.option(
    "--calibration-memory",
    type=Size(),
    default="1GB",
    show_default=True,
    help="Most memory that calibration may add to the process.",
)
@click.option("--plan", type=click.Path(path_type=Path), help="Repeat the decisions of this bundle or plan.toml.")
@click.option(
    "--keep-reference", is_flag=True, help="Add the unoptimized graph, for `hasten bench --against reference`."
)
@click.option(
    "--unproven",
    is_flag=True,
    help="Also compile for targets that cannot run here, without measuring there; the bundle says so.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT even if it is not a bundle.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document for machines.")
def compile_command(
    source: str,
    output: Path,
    targets: tuple[str, ...],
    prune: str,
    prune_structure: str,
    rank: str,
    convolutions: str,
    share: str,
    no_repair: bool,
    quiet: bool,
    as_json: bool,
    **options: object,
) -> None:
    """Compile SOURCE (a Hugging Face folder, a hub id or an .onnx file) into a bundle."""
    from compiler.compile import CompileOptions, compile_model_with
    from compiler.compression import Compression

    compression = Compression(prune, prune_structure, rank, convolutions, share, repair=not no_repair)
    request = CompileOptions(targets=targets, compression=compression, **options)  # type: ignore[arg-type]  # click checked the types above
    with progress(hidden=quiet or as_json) as announce:
        compiled = compile_model_with(source, output, request, announce)
    if as_json:
        click.echo(json.dumps(compiled.to_dict(), indent=1))
    elif not quiet:
        bundle = compiled.bundle
        for proof in bundle.proof.variants:
            console().print(proof_table(bundle, proof))
        for note in compiled.notes:
            console().print(Text.assemble(("note", "yellow"), f" {note}"))
        total = sum(entry.size for entry in bundle.manifest.files)
        console().print(Text(f"{output}: {size_text(total)}, {bundle.digest[:19]}. Next: hasten run {output} …"))


@click.command("vocabulary", short_help="List the tokens that texts need.")
@click.argument("source")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Texts, as --data of `hasten compile`.")
@click.option("--columns", help="Columns of --text, as of `hasten compile`.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The list: .txt or .json.")
def vocabulary_command(source: str, text: Path, columns: str | None, output: Path) -> None:
    """Write the tokens of SOURCE that the texts of a file need, for `hasten compile --vocabulary`."""
    from compiler.data import read_data
    from compiler.source import read_source
    from compiler.vocabulary import tokens_of, write_vocabulary

    found = read_source(source)
    rows = read_data(text, columns, found.task).rows
    tokens = tokens_of(found, (part for row in rows for part in (row.text, row.pair) if part))
    write_vocabulary(tokens, output)
    click.echo(f"{output}: {len(tokens)} tokens. Next: hasten compile {source} --vocabulary {output} …")


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes_command(as_json: bool) -> None:
    """List the built-in recipes and their stages."""
    from compiler.recipe import BUILT_IN, load_recipe

    recipes = [load_recipe(name) for name in BUILT_IN]
    if as_json:
        names = ("name", "description", "tune", "stages", "generation")
        rows = [{name: getattr(recipe, name) for name in names} for recipe in recipes]
        click.echo(json.dumps(rows, indent=1, default=dict))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("recipe", "what it does", "stages"):
        table.add_column(heading)
    for recipe in recipes:
        stages = [f"[dim]{target}[/] {', '.join(names)}" for target, names in recipe.stages.items()]
        stages += [f"[dim]decoders, {target}[/] {', '.join(names)}" for target, names in recipe.generation.items()]
        table.add_row(f"[bold]{recipe.name}[/]", recipe.description, "\n".join(stages))
    console().print(table)


@click.command("passes", short_help="List the passes.")
@click.option("--markdown", is_flag=True, help="Print docs/passes.md.")
def passes_command(markdown: bool) -> None:
    """List every pass with what it does and its options."""
    from passes.document import markdown as document
    from passes.registry import REGISTRY

    if markdown:
        click.echo(document(), nl=False)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("pass", "numbers", "purpose", "what it does"):
        table.add_column(heading)
    for kind in REGISTRY:
        summary = (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        table.add_row(Text(kind.name, "bold"), kind.effect.value, kind.purpose.value, Text(summary))
    console().print(table)


@click.command("prove", short_help="Prove here what was compiled elsewhere.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--threads", type=THREADS, help="Threads to measure with.  [default: physical cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prove_command(bundle: Path, threads: int | None, as_json: bool) -> None:
    """Prove on this machine the variants of BUNDLE that were compiled elsewhere, and write the proof into it."""
    from artifacts.bundle import open_bundle
    from compiler.prove import prove_bundle
    from compiler.report import render

    opened = open_bundle(bundle)
    proofs = prove_bundle(opened, threads or 0)
    if proofs == opened.proof.variants and all(proof.status == "proven" for proof in proofs) and not as_json:
        console().print("nothing to prove: every variant is proven")
    report = render(opened.manifest, proofs, opened.digest).encode()
    proven = opened.with_proof(type(opened.proof)(opened.digest, proofs, ()), {"report.html": report})
    if as_json:
        rows = [{"variant": p.variant, "status": p.status, "reason": p.reason} for p in proven.proof.variants]
        click.echo(json.dumps(rows, indent=1))
    for proof in () if as_json else proven.proof.variants:
        console().print(proof_table(proven, proof))
    if not any(proof.status == "proven" for proof in proven.proof.variants):
        error = ProviderError("no variant could be proven here", "Run this on a machine with the target's provider")
        error.told = as_json
        raise error
