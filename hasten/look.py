"""Commands that look at bundles and machines: inspect, verify, pack, unpack, doctor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from artifacts.constraints import printable

from .show import console, proof_table, size_text

if TYPE_CHECKING:
    from artifacts.bundle import Bundle
    from artifacts.manifest import Manifest, TensorSpec

_COLOURS = {"ok": "green", "warn": "yellow", "skipped": "yellow", "broken": "red", "failed": "red"}
_BROKEN = 1


@click.command("inspect", short_help="Show what a bundle is; or whether a model can be compiled.")
@click.argument("bundle", metavar="BUNDLE_OR_MODEL", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON: manifest and proof; for a model what was found.")
def inspect_command(bundle: Path, as_json: bool) -> None:
    """Show what a BUNDLE is, how it was made and what was proven.

    Of a MODEL (a Hugging Face folder, or a hub id owner/name) say whether it can be compiled, and why not: from its
    config.json alone. Exit code 3 if it cannot.
    """
    from artifacts.bundle import open_bundle

    from .examine import is_model

    if is_model(str(bundle)):
        _inspect_model(str(bundle), as_json)
        return
    opened = open_bundle(bundle)
    if as_json:
        document = {
            "digest": opened.digest,
            "manifest": json.loads(opened.manifest.to_json()),
            "proof": json.loads(opened.proof.to_json())["payload"],
        }
        click.echo(json.dumps(document, indent=1))
        return
    _print_rows(_rows(opened))
    for proof in opened.proof.variants:
        console().print(proof_table(opened, proof))


def _rows(opened: Bundle) -> dict[str, str]:
    manifest = opened.manifest
    rows = {
        "name": manifest.name,
        "task": manifest.task,
        "source": f"{manifest.source.architecture}, {manifest.source.kind}, {manifest.source.digest[:19]}",
        "bundle": f"{opened.digest}, {size_text(sum(entry.size for entry in manifest.files))}",
        "inputs": _specs(manifest.inputs),
        "outputs": _specs(manifest.outputs),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.toolchain),
    }
    if manifest.processor is not None:
        labels = f", labels {', '.join(manifest.processor.labels[:8])}" if manifest.processor.labels else ""
        rows["texts"] = f"at most {manifest.processor.max_length} tokens{labels}"
    if manifest.generation is not None:
        rows["KV cache"] = _cache_sizes(manifest)
        rows["chat"] = "has a chat template" if manifest.generation.chat_template else "no chat template"
    return rows | {variant.id: variant.pipeline for variant in manifest.variants}


def _specs(specs: tuple[TensorSpec, ...]) -> str:
    """Names, dtypes and shapes; of the tensors of a KV cache, the first pair and how many there are."""
    cache = [spec for spec in specs if spec.name.startswith(("past_key_values.", "present."))]
    left_out = {spec.name for spec in cache[2:]}
    told = [f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs if spec.name not in left_out]
    return ", ".join(told) + (f" … {len(cache) // 2} layers" if left_out else "")


def _cache_sizes(manifest: Manifest) -> str:
    """Bytes of a token in the KV cache, and in that of variants which have their own."""
    own = [variant for variant in manifest.variants if variant.cache is not None]
    told = [f"{size_text(_cache_bytes(manifest.inputs))} a token"] if len(own) < len(manifest.variants) else []
    told += [f"{size_text(_cache_bytes(manifest.inputs_of(variant)))} a token in {variant.id}" for variant in own]
    return ", ".join(told)


def _cache_bytes(inputs: tuple[TensorSpec, ...]) -> int:
    """Bytes that a token takes in the KV cache."""
    widths = {"float32": 4, "float16": 2}
    cache = [spec for spec in inputs if spec.name.startswith("past_key_values.")]
    return sum(int(spec.shape[1]) * int(spec.shape[3]) * widths.get(spec.dtype, 1) for spec in cache)


def _inspect_model(source: str, as_json: bool) -> None:
    from artifacts.errors import UnsupportedError

    from .examine import examine

    found = examine(source)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        told = {"name": found.name, "architecture": found.architecture, "task": found.task or "unknown"}
        answer = "yes: hasten compile takes it" if found.supported else "no"
        _print_rows(told | {name: str(value) for name, value in found.facts.items()} | {"supported": answer})
    if not found.supported:
        error = UnsupportedError(f"{found.name} cannot be compiled: {found.reason}")
        error.told = as_json
        raise error


def _print_rows(rows: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows.items():
        table.add_row(Text(key, style="dim"), Text(printable(value)))
    console().print(table)


@click.command("verify", short_help="Check hashes, graphs and the golden test of a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify_command(bundle: Path, as_json: bool) -> None:
    """Check hashes and graphs of BUNDLE and replay its golden test on every provider here. Exit code 6 if one fails."""
    from artifacts.errors import IntegrityError

    from .verify import verify

    findings = []
    for finding in verify(bundle):
        findings.append(finding)
        if not as_json:
            _print_status(finding.status, finding.name, finding.detail)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    if failed := [finding for finding in findings if finding.status == "failed"]:
        error = IntegrityError(f"{failed[0].name}: {failed[0].detail}", "Compile again, or get the bundle again")
        error.told = as_json
        raise error


@click.command("pack", short_help="Pack a bundle into one file.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path), required=False)
def pack_command(bundle: Path, file: Path | None) -> None:
    """Pack BUNDLE into one FILE (by default BUNDLE.hasten). The same bundle gives the same bytes."""
    from artifacts.pack import measure, pack

    place = file or bundle.with_name(f"{bundle.resolve().name}.hasten")
    found = measure(pack(bundle, place), place)
    zeros = f"; {found.zeros / found.weights:.0%} of the bytes of its weights are zero" if found.weights else ""
    click.echo(f"{place}: {size_text(found.packed)} of {size_text(found.size)}{zeros}")


@click.command("unpack", short_help="Unpack a file into a bundle.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Replace OUTPUT even if it is not a bundle.")
def unpack_command(file: Path, output: Path | None, force: bool) -> None:
    """Unpack FILE into the bundle OUTPUT (by default FILE without its suffix), checking every byte."""
    from artifacts.errors import UsageError
    from artifacts.pack import unpack

    if output is None and not file.suffix:
        raise UsageError(f"{file} has no suffix to take away", "Name the OUTPUT folder")
    place = output or file.with_suffix("")
    unpack(file, place, force=force)
    click.echo(f"{place}: complete and verified")


@click.command("doctor", short_help="Check this installation and machine.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(bundle: Path | None, as_json: bool) -> None:
    """Check this installation and machine; with BUNDLE also how it would run here. Exit code 1: broken."""
    from runtimes.doctor import diagnose

    report = diagnose(bundle)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in report.checks], indent=1))
    else:
        for check in report.checks:
            _print_status(check.status, check.name, check.detail, check.remedy)
    if any(check.status == "broken" for check in report.checks):
        raise click.exceptions.Exit(_BROKEN)


def _print_status(status: str, name: str, detail: str, remedy: str = "") -> None:
    line = Text.assemble((f"{status:8}", _COLOURS[status]), (name, "bold"), f"  {detail}")
    if remedy:
        line.append(f"  {remedy}", style="dim")
    console().print(line, soft_wrap=True)
