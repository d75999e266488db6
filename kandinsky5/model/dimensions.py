"""Dimensions of a model, out of the ``config.json`` it is published with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def dimensions_of(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a file's values that are fields of a configuration's dataclass; lists become tuples."""
    known = {field.name for field in fields(config)}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key in known
    }
