"""The command line: `st-m3se`, thin commands over the package's functions, one module each."""

from __future__ import annotations

from typing import Annotated

import typer

from st_m3se import __version__
from st_m3se.cli.candidates import candidates
from st_m3se.cli.combine import combine
from st_m3se.cli.convert import convert
from st_m3se.cli.describe import describe
from st_m3se.cli.diagnose import diagnose
from st_m3se.cli.distill import distill
from st_m3se.cli.errors import with_flags
from st_m3se.cli.evaluate import evaluate
from st_m3se.cli.score import score

__all__ = ["app", "main"]

COMMANDS = (distill, candidates, score, describe, combine, convert, evaluate, diagnose)
"""In the order in which they are used."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"st-m3se {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Distil slow cross-encoders into fast bi-encoders.

    distill does all of it, from texts to a trained and measured model. By
    hand, in this order, each with an example in its own --help:

    1. candidates finds documents for each query;
    2. score lets a teacher score them: describe shows the scores,
       combine averages several teachers', convert reads those of others;
    3. training is Python, as the README shows;
    4. evaluate measures the model before and after, and its teacher;
    5. diagnose shows where they differ.
    """


for command in COMMANDS:
    app.command()(with_flags(command))


def main() -> None:
    """Run the command line."""
    app()
