"""A diagnosis in the model card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file
from st_m3se.core.markdown import markdown
from st_m3se.diagnostics.diagnosis import Diagnosis
from st_m3se.diagnostics.report import about, about_gap, render_markdown

__all__ = ["add_to_model_card", "put_section"]

START, END = "<!-- st-m3se diagnosis -->", "<!-- end of st-m3se diagnosis -->"
PICTURE = "assets/st_m3se_margins.png"
BEFORE = (
    "\n<!--\n## Bias, Risks and Limitations",
    "\n## Training Details",
    "\n## Citation",
    "\n## Additional Resources",
)


def add_to_model_card(model_folder: str | Path, diagnosis_folder: str | Path) -> Path:
    """Put the margin plot, the numbers and the closed share of the teacher's lead into a saved model's card.

    sentence-transformers writes ``README.md`` anew whenever a model is saved, so this goes into the card of a folder
    that is already saved, in front of "Training Details", and replaces its own section when called again. Publish the
    folder as it is: ``model.push_to_hub("me/model", local_model_path=model_folder)``.

    Args:
        model_folder: Where ``model.save_pretrained`` has written the model.
        diagnosis_folder: What ``st-m3se diagnose`` has written, with its figures.

    Raises:
        FormatError: If one of the folders is not what it should be.
    """
    model_folder, diagnosis_folder = Path(model_folder), Path(diagnosis_folder)
    card, figure = model_folder / "README.md", diagnosis_folder / "margins.png"
    diagnosis = Diagnosis.load(diagnosis_folder)
    if not card.is_file():
        raise FormatError("the model has no card there. Save it: model.save_pretrained(folder).", file=str(card))
    if not figure.is_file():
        raise FormatError("the diagnosis has no figure. `st-m3se diagnose` draws it.", file=str(figure))
    (model_folder / PICTURE).parent.mkdir(exist_ok=True)
    shutil.copyfile(figure, model_folder / PICTURE)
    name = f" on {markdown(diagnosis.data['name'])}" if diagnosis.data["name"] else ""
    parts = [
        START,
        f"## How it separates relevant documents{name}",
        f"![Densities of the normalised margins]({PICTURE})",
        "Margin: a relevant document's score minus another's of the same query, divided by the scorer's mean range of "
        "scores in a list (the normalisation is st-m3se's own). AUC per query: the share of these margins above 0.",
        render_markdown(diagnosis),
        about(diagnosis),
    ]
    if diagnosis.gap is not None:
        parts.append(f"**Distance to the teacher.** {about_gap(diagnosis, markdown)}")
    put_section(card, "\n\n".join([*parts, END]), START, END)
    return card


def put_section(card: Path, section: str, start: str, end: str) -> None:
    """Put a section, from its line ``start`` to its line ``end``, into a card; one that is there is replaced."""
    text = card.read_text(encoding="utf-8")
    if start in text and end in text:
        text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, text, count=1, flags=re.DOTALL)
    else:
        places = [place for heading in BEFORE if (place := text.find(heading)) >= 0]
        place = min(places, default=len(text))
        text = f"{text[:place].rstrip()}\n\n{section}\n{text[place:]}"
    with atomic_file(card, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
