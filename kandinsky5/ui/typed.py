"""What people type into the form, read into values; each refusal names its field and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.request import MAX_SEED, RANGES, LoraChoice
from kandinsky5.ui.fields import Field


def seed_of(text: Any) -> int | None:
    """The seed from its text; empty draws one.

    A text because a browser's numbers lose digits above 2⁵³.
    """
    written = str(text or "").strip()
    if not written:
        return None
    if not written.isdecimal() or int(written) > MAX_SEED:
        raise UserError(
            "seed", written, f"a whole number from 0 to {MAX_SEED}, or nothing for a random one"
        )
    return int(written)


def amount_of(field: Field, text: Any) -> float | None:
    """A number from its text, with or without its unit; None when empty: the request's default.

    A text because an empty number of gradio's becomes 0 when its part of the page is opened.
    """
    written = str("" if text is None else text).strip()
    if not written:
        return None
    try:
        return float(written.lower().removesuffix(field.unit).strip().replace(",", "."))
    except ValueError as error:
        low, high = RANGES[field.name]
        unit = f" of {field.unit.upper()}" if field.unit else ""
        allowed = f"a number{unit} from {low:g} to {high:g}, or nothing"
        raise UserError(field.name, written, allowed) from error


def lora_of(
    path_field: Field, strength_field: Field, path: Any, strength: Any
) -> LoraChoice | None:
    """A LoRA from its row; None where no file is named."""
    file = lora_name(path_field, path)
    if file is None:
        return None
    written = str(strength if strength is not None else "").strip() or "1"
    try:
        return LoraChoice(file, float(written.replace(",", ".")))
    except (ValueError, UserError) as error:
        allowed = "a number from -10 to 10; 1 is as trained"
        raise UserError(strength_field.name, written, allowed) from error


def lora_name(field: Field, text: Any) -> str | None:
    """A LoRA's path, or its bare name, which is looked for in the folders for models; None when empty."""
    written = cleaned(text)
    if written and "/" not in written and "\\" not in written and not Path(written).exists():
        return written
    return existing_path(field, written)


def existing_path(field: Field, text: Any) -> str | None:
    """The path a person typed, without quotes and with ``~`` expanded; None when empty.

    Raises:
        UserError: nothing is there, or not what the field asks for.
    """
    written = cleaned(text)
    if not written:
        return None
    what = "folder" if field.kind == "folder" else "file"
    try:
        path = Path(written).expanduser()
        fits = path.is_dir() if what == "folder" else path.is_file()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(field.name, written, f"the path of a {what} on this machine") from error
    if not exists:
        raise UserError(field.name, written, f"nothing is there; give the path of a {what}")
    if not fits:
        raise UserError(field.name, written, f"that is not a {what}")
    return str(path)


def cleaned(text: Any) -> str:
    """A pasted path without blanks and quotes around it."""
    return str(text or "").strip().strip("'\"“”").strip()
