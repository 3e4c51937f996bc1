"""The command line. Each command is a thin reading of its options; the work is done by the rooms below."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import click

from artifacts.errors import HastenError, InstallationError, OutputError, UsageError

from . import __version__, interrupts

COMMANDS = {
    "compile": ("make", "compile_command"),
    "vocabulary": ("make", "vocabulary_command"),
    "recipes": ("make", "recipes_command"),
    "passes": ("make", "passes_command"),
    "prove": ("make", "prove_command"),
    "inspect": ("look", "inspect_command"),
    "verify": ("look", "verify_command"),
    "pack": ("look", "pack_command"),
    "unpack": ("look", "unpack_command"),
    "doctor": ("look", "doctor_command"),
    "run": ("use", "run_command"),
    "chat": ("converse", "chat_command"),
    "eval": ("evaluate", "eval_command"),
    "bench": ("use", "bench_command"),
    "serve": ("serve", "serve_command"),
    "adapter": ("adapters", "adapter_command"),
    "tune": ("tune", "tune_command"),
    "profile": ("tune", "profile_command"),
}
"""Command -> the module of this package that holds it, imported only when the command is called, and its name there."""

INTERRUPTED = 130
CRASHED = 70
_BROKEN_PIPE = 141
_COMPILE_PACKAGES = {"torch", "transformers", "optimum", "requests", "onnx", "onnx_ir", "onnxscript", "safetensors"}
_COMPILE_PACKAGES |= {"scipy", "tomli_w", "huggingface_hub"}


class ReaderGoneError(Exception):
    """Nobody reads standard output any more. Not an OSError: click would end the process itself, with code 1."""


class Commands(click.Group):
    """A group that finds its commands in ``COMMANDS``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGoneError from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f".{module}", __package__), name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hasten")
def cli() -> None:
    """Compile a trained model into the fastest ONNX Runtime artifact that keeps your quality budget, with proof."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, or the code that artifacts/errors.py states for the error."""
    interrupts.install()
    code = _run(arguments)
    gc.freeze()  # torch leaves a million objects, and a collector that would look at each once more before the end
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    try:
        code = cli.main(args=arguments, prog_name="hasten", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        interrupts.forget()
        click.echo("hasten: interrupted; nothing was left half-written", err=True)
        return INTERRUPTED
    except ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the last resort: a user sees one line, never a traceback
        ours = _as_ours(error)
        return _crash(error) if ours is None else _fail(ours)
    return code if isinstance(code, int) else 0


def _as_ours(error: Exception) -> HastenError | None:
    """What a user is told for an error; None where it is a bug of ours."""
    if isinstance(error, HastenError):
        return error
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message(), _help_hint(error))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _COMPILE_PACKAGES:
        return InstallationError(f"{error.name} is not installed", "pip install 'hasten[compile]'")
    if isinstance(error, OSError):
        return OutputError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    return None


def _fail(error: HastenError) -> int:
    if _wants_json() and not error.told:
        document = {"error": type(error).__name__, "what": error.what, "remedy": error.remedy, "exit": error.exit_code}
        click.echo(json.dumps(document))
    click.echo(f"hasten: {error}", err=True)
    return error.exit_code


def _crash(error: BaseException) -> int:
    folder = Path(tempfile.mkdtemp(prefix="hasten-crash-"))
    report = folder / "traceback.txt"
    report.write_text(f"hasten {__version__}\n{sys.argv}\n\n{''.join(traceback.format_exception(error))}")
    click.echo(f"hasten: this is a bug ({type(error).__name__}); please report it with {report}", err=True)
    return CRASHED


def _help_hint(error: click.ClickException) -> str:
    context: Any = getattr(error, "ctx", None)
    return f"See {context.command_path} --help" if context is not None else ""


def _wants_json() -> bool:
    return "--json" in sys.argv
