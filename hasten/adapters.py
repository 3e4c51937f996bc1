"""``hasten adapter``: LoRA adapters of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from .show import console, size_text

if TYPE_CHECKING:
    from artifacts.adapters import Adapter
    from artifacts.bundle import Bundle

_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("adapter", short_help="Add, list and remove LoRA adapters.")
def adapter_command() -> None:
    """LoRA adapters of a bundle: a text is generated with one of them, or with none."""


@adapter_command.command("add")
@_BUNDLE
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What calls name it by: lower case letters, digits, '.', '_' and '-'.")
@click.option(
    "--against",
    metavar="SOURCE",
    help="The model that the bundle was made of: hold the bundle with the adapter to that model with it.",
)
@click.option("--replace", "replace_it", is_flag=True, help="Take the place of an adapter of that name.")
@click.option("--any-base", is_flag=True, help="Also where it says that it was trained on a model of another name.")
@_JSON
def add_command(
    bundle: Path, folder: Path, name: str, against: str | None, replace_it: bool, any_base: bool, as_json: bool
) -> None:
    """Add the LoRA adapter of FOLDER, as PEFT saves it, to BUNDLE. The base is not compiled again."""
    from compiler.adapters import add_adapter

    added = add_adapter(bundle, folder, name, replace_it=replace_it, any_base=any_base, against=against)
    if as_json:
        held = [vars(one) for one in added.agreement]
        document = {"digest": added.bundle.digest, "adapter": _row(added.adapter), "against": held}
        click.echo(json.dumps({**document, "notes": list(added.notes)}, indent=1))
        return
    for one in added.agreement:
        told = f"{one.variant}: {one.error:.2g} off the original with the adapter, {one.without:.2g} without it"
        console().print(Text(f"{told}; the adapter moves the logits by {one.effect:.2g}"))
    for note in added.notes:
        console().print(Text.assemble(("note", "yellow"), f" {note}"))
    modules, size = len(added.adapter.modules), size_text(added.adapter.size)
    console().print(Text(f"{name}: {modules} modules, {size}. Next: hasten run {bundle} --adapter {name} …"))


@adapter_command.command("list")
@_BUNDLE
@_JSON
def list_command(bundle: Path, as_json: bool) -> None:
    """List the adapters of BUNDLE."""
    from artifacts.bundle import open_bundle

    adapters = open_bundle(bundle, verify=False).manifest.adapters or ()
    if as_json:
        click.echo(json.dumps([_row(one) for one in adapters], indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("adapter", "modules", "rank", "size", "trained on"):
        table.add_column(heading)
    for one in adapters:
        ranks = sorted({module.rank for module in one.modules})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        table.add_row(one.name, str(len(one.modules)), rank, size_text(one.size), Text(one.base))
    console().print(table if adapters else Text(f"{bundle} has no adapters"))


@adapter_command.command("remove")
@_BUNDLE
@click.argument("name")
@_JSON
def remove_command(bundle: Path, name: str, as_json: bool) -> None:
    """Take the adapter NAME out of BUNDLE."""
    from compiler.adapters import remove_adapter

    left: Bundle = remove_adapter(bundle, name)
    names = [one.name for one in left.manifest.adapters or ()]
    if as_json:
        click.echo(json.dumps({"digest": left.digest, "adapters": names}, indent=1))
        return
    console().print(Text(f"{bundle} has {', '.join(names) or 'no adapters'}"))


def _row(adapter: Adapter) -> dict[str, object]:
    modules = [{"path": one.path, "rank": one.rank} for one in adapter.modules]
    return {"name": adapter.name, "base": adapter.base, "source": adapter.source, "modules": modules}
