"""The command line: `st-m3se`, thin commands over the package's functions, one module each."""

from __future__ import annotations

import typer

from st_m3se.cli.candidates import candidates
from st_m3se.cli.combine import combine
from st_m3se.cli.convert import convert
from st_m3se.cli.describe import describe
from st_m3se.cli.diagnose import diagnose
from st_m3se.cli.evaluate import evaluate
from st_m3se.cli.score import score

__all__ = ["app", "main"]

app = typer.Typer(
    help="Distil slow cross-encoders into fast bi-encoders.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


@app.callback()
def root() -> None:
    """Distil slow cross-encoders into fast bi-encoders."""


app.command()(candidates)
app.command()(score)
app.command()(convert)
app.command()(describe)
app.command()(combine)
app.command()(diagnose)
app.command()(evaluate)


def main() -> None:
    """Run the command line."""
    app()
