"""How a transformer's weights lie in a file, and which of its layers may be quantised.

Kinds of files beside the published floats, by the program that writes them:

=================  ==========================================  ===============================================
``int8``           this project's own                          ``X.weight`` int8, ``X.weight_scales``
``int8-community`` the earlier community program               ``X.weight_int8``, ``X.weight_scales``
``fp8-community``  that program                                ``X.weight_fp8``, ``X.weight_scale``
``fp8-scaled``     ComfyUI                                     ``X.weight`` float8, ``X.weight_scale`` or
                                                               ``X.scale_weight``, maybe ``X.input_scale``
``fp8-unscaled``   a plain cast                                ``X.weight`` float8 alone
=================  ==========================================  ===============================================

Everywhere a weight is its stored number times its scale.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from int8 import COMMUNITY, Int8Scheme
from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import MARKERS, Checkpoint
from kandinsky5.model.safetensors_file import TensorInfo, shown

FORMAT_KEY, VERSION_KEY, SCHEME_KEY = "k1_format", "k1_version", "k1_scheme"
SOURCE_KEY = "k1_source_header_sha256"
SOURCE_FINGERPRINT_KEY = "k1_source_fingerprint"
"""Entries of the header metadata of files this program has converted."""
OWN_INT8_FORMAT = "k1-int8"
OWN_INT8_VERSION = 1
"""Raised whenever older programs would read the file wrongly."""

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
INT8_SCALES = ".weight_scales"
FLOAT_SCALES = (".weight_scale", ".scale_weight")
_NOT_NEEDED = (".input_scale", ".scale_input", ".comfy_quant")
"""Written beside scaled weights and not used: inputs are scaled by what they are, which is more exact."""
_BESIDE_WEIGHTS = (INT8_SCALES, *FLOAT_SCALES, *_NOT_NEEDED)
_QUANTISED_NAME = re.compile(r"\.weight_(int8|fp8)$")

_ATTENTION = ("to_query", "to_key", "to_value", "out_layer")
_FEED_FORWARD = ("in_layer", "out_layer")
QUANTISED_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "text_transformer_blocks": {"self_attention": _ATTENTION, "feed_forward": _FEED_FORWARD},
    "visual_transformer_blocks": {
        "self_attention": _ATTENTION,
        "cross_attention": _ATTENTION,
        "feed_forward": _FEED_FORWARD,
    },
}
"""Which linear layers are quantised: attention and feed-forward. Embeddings, modulation, norms and the
output layer never are: they are small, and what they round reaches every token."""

_QUANTISED_WEIGHT = re.compile(
    "|".join(
        rf"{blocks}\.\d+\.{part}\.({'|'.join(layers)})\.weight"
        for blocks, parts in QUANTISED_LAYERS.items()
        for part, layers in parts.items()
    )
)


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor of the model lies in a file.

    Attributes:
        name: in the model; ``X.weight`` for a weight however it is stored.
        source: name of its numbers in the checkpoint.
        info: dtype, shape and place of these.
        scales: name of its scales in the checkpoint, or None.
        scheme: of int8 numbers, else None.
    """

    name: str
    source: str
    info: TensorInfo
    scales: str | None = None
    scheme: Int8Scheme | None = None

    @property
    def is_float8(self) -> bool:
        return self.info.dtype in FLOAT8

    @property
    def is_plain(self) -> bool:
        """Whether the numbers are the weights: floats of 16 bits or more without scales."""
        return self.info.dtype in FLOATS and self.scales is None


def is_quantised_layer(weight: str) -> bool:
    """Whether a weight, by its name in the model (``….to_query.weight``), belongs to a layer of the table."""
    return _QUANTISED_WEIGHT.fullmatch(weight) is not None


def is_beside_weights(name: str) -> bool:
    """Whether a tensor of a checkpoint is a scale or a marker rather than one of the model's tensors."""
    return name in MARKERS or name.endswith(_BESIDE_WEIGHTS)


def model_name(name: str) -> str:
    """The model's name of a tensor stored as ``X.weight_int8`` or ``X.weight_fp8``; others as they are."""
    return _QUANTISED_NAME.sub(".weight", name)


def weight_shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Name → shape as an unquantised checkpoint has them: scales left out, ``weight_int8`` as ``weight``."""
    return {
        model_name(name): info.shape
        for name, info in tensors.items()
        if not is_beside_weights(name)
    }


def quantization_of(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str:
    """How the weights are stored: a name of this module's table, ``bf16``, ``fp16``, ``fp32``, ``fp64``,
    ``mixed`` or ``unknown``."""
    dtypes = {info.dtype for name, info in tensors.items() if not is_beside_weights(name)}
    if metadata.get(FORMAT_KEY, "").startswith(OWN_INT8_FORMAT):
        return "int8"
    for kind in ("int8", "fp8"):
        if any(name.endswith(f".weight_{kind}") for name in tensors):
            return f"{kind}-community"
    if any(dtype.startswith("F8_") for dtype in dtypes):
        scaled = any(name in MARKERS or name.endswith(FLOAT_SCALES) for name in tensors)
        return "fp8-scaled" if scaled else "fp8-unscaled"
    if not dtypes or not dtypes <= FLOATS:
        return "unknown"
    if len(dtypes) > 1:
        return "mixed"
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}[dtypes.pop()]


def own_scheme(path: Path, metadata: Mapping[str, str]) -> Int8Scheme | None:
    """The scheme of this project's own int8 file; None for other files.

    Raises:
        CheckpointError: written by a newer program, or its header is damaged.
    """
    if not metadata.get(FORMAT_KEY, "").startswith(OWN_INT8_FORMAT):
        return None
    version = metadata.get(VERSION_KEY, "")
    if metadata[FORMAT_KEY] != OWN_INT8_FORMAT or version != str(OWN_INT8_VERSION):
        stated = f"{metadata[FORMAT_KEY][:20]!r} version {version[:20]!r}"
        raise CheckpointError(
            path,
            f"{stated}, this program reads {OWN_INT8_FORMAT!r} version {OWN_INT8_VERSION}:"
            " update K1, or convert the original file again",
        )
    try:
        values = json.loads(metadata.get(SCHEME_KEY, ""))
        if not isinstance(values, dict):
            raise ValueError("its int8 scheme is not a JSON object")
        return Int8Scheme.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"header entry {SCHEME_KEY}: {str(error)[:200]}") from error


def own_metadata(scheme: Int8Scheme) -> dict[str, str]:
    """What marks a file as this project's int8."""
    return {
        FORMAT_KEY: OWN_INT8_FORMAT,
        VERSION_KEY: str(OWN_INT8_VERSION),
        SCHEME_KEY: json.dumps(scheme.to_dict(), sort_keys=True),
    }


def stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Name in the model → how it lies in the file, in the order of the disk.

    Raises:
        CheckpointError: scales that do not fit their weights, a weight stored twice, a dtype or a format
            this program does not read.
    """
    scheme = own_scheme(checkpoint.path, checkpoint.metadata)
    stored: dict[str, StoredTensor] = {}
    for source in checkpoint.names_in_file_order():
        if is_beside_weights(source):
            continue
        name = model_name(source)
        if name in stored:
            raise CheckpointError(checkpoint.path, f"{shown(name)} is stored twice")
        own = scheme if source == name else COMMUNITY
        stored[name] = _stored(checkpoint, name, source, own)
    _refuse_orphans(checkpoint, stored.values())
    return stored


def stored_float(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """How one tensor lies in a file of floats, float8 ones with their scales among them.

    Raises:
        CheckpointError: another dtype, or scales that do not fit.
    """
    return _stored(checkpoint, name, name, None)


def _stored(
    checkpoint: Checkpoint, name: str, source: str, scheme: Int8Scheme | None
) -> StoredTensor:
    info = checkpoint.tensors[source]
    layer = name.removesuffix(".weight")
    if info.dtype == "I8" and name != layer and scheme is not None:
        _check_int8_scales(checkpoint, name, info, scheme)
        return StoredTensor(name, source, info, layer + INT8_SCALES, scheme)
    if info.dtype not in FLOATS | FLOAT8:
        unknown = " and the header does not say how it was quantised" if info.dtype == "I8" else ""
        raise CheckpointError(
            checkpoint.path,
            f"{name} has dtype {info.dtype}{unknown}; weights in bf16, fp16, fp32, fp8 or int8 are needed",
        )
    found = [layer + end for end in FLOAT_SCALES if layer + end in checkpoint.tensors]
    if name == layer or not found:
        return StoredTensor(name, source, info)
    scales = checkpoint.tensors[found[0]]
    rows = info.shape[0] if info.shape else 1
    if scales.dtype not in FLOATS or scales.elements not in (1, rows) or len(scales.shape) > 2:
        raise _misfit(checkpoint, found[0], f"one number or {rows}", scales)
    return StoredTensor(name, source, info, found[0])


def _check_int8_scales(
    checkpoint: Checkpoint, name: str, info: TensorInfo, scheme: Int8Scheme
) -> None:
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(
            checkpoint.path,
            f"{shown(name)} is int8 of shape {list(info.shape)};"
            " [outputs, inputs], both at least 1, is needed",
        )
    scales = name.removesuffix(".weight") + INT8_SCALES
    if scales not in checkpoint.tensors:
        raise CheckpointError(checkpoint.path, f"{shown(name)} is int8 and {shown(scales)} missing")
    found, needed = checkpoint.tensors[scales], (info.shape[0], scheme.groups(info.shape[1]))
    if found.dtype != "F32" or found.shape != needed:
        raise _misfit(checkpoint, scales, f"F32 {list(needed)}", found)


def _misfit(checkpoint: Checkpoint, scales: str, needed: str, found: TensorInfo) -> CheckpointError:
    given = f"{found.dtype} {list(found.shape)}"
    return CheckpointError(
        checkpoint.path, f"{shown(scales)} is {given}, its weight needs {needed}: scales do not fit"
    )


def _refuse_orphans(checkpoint: Checkpoint, stored: Iterable[StoredTensor]) -> None:
    """Scales that belong to nothing mean that numbers would be read without them."""
    used = {tensor.scales for tensor in stored}
    for name, info in checkpoint.tensors.items():
        is_scale = name.endswith((INT8_SCALES, *FLOAT_SCALES)) and math.prod(info.shape) > 0
        if is_scale and name not in used:
            raise CheckpointError(checkpoint.path, f"{shown(name)} is the scale of no weight")
