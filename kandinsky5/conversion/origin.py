"""What a converted file was made of: told in its header, and compared before the same name is used again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kandinsky5.conversion.plan import ConversionPlan
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.safetensors_file import SafetensorsFile
from kandinsky5.model.weights import SOURCE_FINGERPRINT_KEY, SOURCE_KEY

ANEW = "delete it to convert anew, or give another name"


def is_made_already(out: Path, plan: ConversionPlan, source: Checkpoint) -> bool:
    """Whether ``out`` is there and is what this conversion gives, as its header tells; no tensor is read.

    Args:
        out: where the converted file would go.
        plan: the conversion.
        source: what would be converted.

    Raises:
        UserError: field ``out``: a file is there that is something else. It is not replaced: what it holds
            may be the only copy.
    """
    if not out.is_file():
        return False
    try:
        with SafetensorsFile(out) as there:
            metadata, header_sha256 = there.metadata, there.header_sha256
    except CheckpointError as error:
        reason = f"is there already and cannot be used ({error.reason})"
        raise UserError("out", str(out), f"{reason}: {ANEW}") from error
    if header_sha256 == hashlib.sha256(plan.header[8:]).hexdigest():
        return True
    made_of, wanted = metadata.get(SOURCE_FINGERPRINT_KEY), plan.source_fingerprint
    if SOURCE_KEY not in metadata:
        reason = "is there already and was not made by a conversion"
    elif made_of is None and metadata[SOURCE_KEY] == source.header_sha256:
        reason = (
            "was converted by an earlier K1, which did not note enough of its source to compare"
        )
    elif made_of != wanted:
        name = source.path.name
        reason = f"was converted from a file other than {name}, or from {name} before it changed"
    else:
        reason = "is this source in another format, or as another K1 converts it"
    raise UserError("out", str(out), f"{reason}: {ANEW}")
