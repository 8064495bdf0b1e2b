"""`st-m3se distill`: its flags are the fields of `DistillationConfig`."""

from __future__ import annotations

import inspect
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from st_m3se.distillation.config import DistillationConfig

__all__ = ["distill"]

OUTPUT = DistillationConfig.output
Flag = inspect.Parameter.KEYWORD_ONLY


def distill(
    *,
    demo: bool,
    quick: bool,
    config: Path | None,
    write_config: Path | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Distil a teacher into a student: from texts to a trained, measured model.

    For example: st-m3se distill --data my-data --teacher cross-encoder/ms-marco-MiniLM-L12-v2 --student
    sentence-transformers/all-MiniLM-L6-v2 --output distilled

    Finds candidates, checks the teacher on held-out queries, lets it score the training candidates, trains, measures.
    Every stage is a folder of the output; the same command after a kill or Ctrl-C goes on where it was. Needs the
    extra named eval; accelerate launch -m st_m3se distill ... shares the work among GPUs.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    data: Any = None
    teacher: Any = None
    output = given.get("output", OUTPUT)
    try:
        options = DistillationConfig() if config is None else DistillationConfig.from_toml(config)
        if demo or quick:
            if not demo:
                raise ValueError("--quick belongs to --demo. Cut other data with --train-queries, --test-queries.")
            from st_m3se.distillation.demo import demo_options, load_demo_data, load_demo_teacher

            options = options.with_options(demo_options(quick))
        options = options.with_options(given)
        if write_config is not None:
            write_config.parent.mkdir(parents=True, exist_ok=True)
            write_config.write_text(options.to_toml(), encoding="utf-8")
            typer.echo(f"wrote {write_config}")
            return
        if demo:
            data = load_demo_data(quick)
            teacher = load_demo_teacher(options)
        from transformers.utils import logging

        from st_m3se.distillation.pipeline import distill as run

        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # reports of heads that are not used here
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

        command = shlex.join(["st-m3se", *sys.argv[1:]])
        run(data, teacher, config=options, dry_run=dry_run, command=command)
    except KeyboardInterrupt:
        done = sorted(file.parent.name for file in Path(output).glob("*/finished.json"))
        typer.echo(
            f"\nstopped. Saved in {output}: {', '.join(done) or 'nothing finished yet'}; scores and checkpoints of the "
            "stage under way are kept as well. The same command goes on from there.",
            err=True,
        )
        raise typer.Exit(130) from None


def _parameters() -> list[inspect.Parameter]:
    """The flags: those of the command, then one for each option."""
    own: list[tuple[str, Any, Any, Any]] = [
        ("demo", bool, False, typer.Option("--demo", help="Real texts and models from PyPI packages, no hub.")),
        ("quick", bool, False, typer.Option("--quick", help="With --demo: a small run, some 3 minutes.")),
        ("config", Path | None, None, typer.Option("--config", help="A TOML file of options; flags win.")),
        ("write_config", Path | None, None, typer.Option("--write-config", help="Write all options there, and stop.")),
        ("dry_run", bool, False, typer.Option("--dry-run", help="Say what would be done, and about how long.")),
    ]
    parameters = [_parameter(name, Annotated[kind, option], default) for name, kind, default, option in own]
    for each in fields(DistillationConfig):
        kind, many = each.metadata["kind"], isinstance(each.default, tuple)
        flag = f"--{each.name.replace('_', '-')}"
        names = f"{flag}/--no{flag[1:]}" if kind is bool else flag
        default = each.default
        shown = "" if default is None or default == () else f" [default: {_shown(default)}]"
        option = typer.Option(names, help=each.metadata["help"] + shown, rich_help_panel=each.metadata["group"].title())
        annotation = list[kind] | None if many else kind | None  # type: ignore[valid-type]
        parameters.append(_parameter(each.name, Annotated[annotation, option], None))
    return parameters


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A flag as typer reads it from a signature."""
    return inspect.Parameter(name, Flag, default=default, annotation=annotation)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


distill.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
distill.__annotations__ = {each.name: each.annotation for each in _parameters()}
