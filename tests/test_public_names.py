"""What users may rely on: the names of ``hasten``, their signatures, and the table of commands."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import click
import pytest

import hasten
from compiler.compile import CompileOptions
from compiler.compression import Compression
from hasten.cli import COMMANDS, cli

NAMES = ["Bundle", "HastenError", "Target", "compile_model", "load", "open_bundle", "pack", "serve_engine", "unpack"]


def test_the_list_of_names() -> None:
    assert hasten.__all__ == NAMES
    assert dir(hasten) == sorted([*NAMES, "__version__"])
    assert sorted(hasten._HOMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    found = getattr(hasten, name)
    assert found.__name__ == name
    assert found.__doc__
    assert found is getattr(importlib.import_module(hasten._HOMES[name]), name)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'hasten' has no attribute 'compile'"):
        _ = hasten.compile


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_signatures() -> None:
    assert parameters(hasten.compile_model) == ["source", "output", "options"]
    assert parameters(hasten.load) == [
        *("path", "device", "provider", "variant", "threads", "lanes", "cache", "verify", "draft"),
    ]
    assert parameters(hasten.open_bundle) == ["path", "verify"]
    assert parameters(hasten.pack)[:2] == ["bundle_dir", "file"]
    assert parameters(hasten.unpack)[:2] == ["file", "out"]
    assert parameters(hasten.serve_engine) == ["path", "cache", "options"]
    assert [field.name for field in dataclasses.fields(CompileOptions)] == [
        *("targets", "recipe", "task", "pooling", "name", "data", "columns", "max_drop", "seed", "threads"),
        *("calibration_rows", "calibration_memory", "plan", "unproven", "keep_reference", "force"),
        *("vocabulary", "compression"),
    ]
    assert [field.name for field in dataclasses.fields(Compression)] == [
        *("prune", "prune_structure", "rank", "convolutions", "share", "repair"),
    ]
    assert CompileOptions().targets == ("cpu",)
    assert CompileOptions().recipe == "balanced"


def test_every_option_of_a_compile_is_an_option_of_the_command() -> None:
    command = cli.get_command(click.Context(cli), "compile")
    assert command is not None
    options = {parameter.name for parameter in command.params}
    known = {field.name for kind in (CompileOptions, Compression) for field in dataclasses.fields(kind)}
    assert known - {"compression", "repair"} <= options
    assert "no_repair" in options


def test_the_commands() -> None:
    assert list(COMMANDS) == [
        *(
            "compile",
            "vocabulary",
            "recipes",
            "passes",
            "prove",
            "inspect",
            "verify",
            "pack",
            "unpack",
            "doctor",
            "run",
            "chat",
            "eval",
            "bench",
            "serve",
            "adapter",
            "tune",
            "profile",
        )
    ]
    for name, (module, function) in COMMANDS.items():
        command = getattr(importlib.import_module(f"hasten.{module}"), function)
        assert isinstance(command, click.Command)
        assert command.name == name
        assert command.help
    assert cli.get_command(click.Context(cli), "compress") is None
