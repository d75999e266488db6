"""8-bit linear layers: quantisation, kernels and their references. Knows torch and Triton, nothing of K1."""

from int8.backends import backends_for
from int8.check import Examination, examine, self_test
from int8.linear import Int8Linear
from int8.ops import int8_matmul, quantize_activation, quantize_weight
from int8.reference import dequantize
from int8.scheme import COMMUNITY, DEFAULT, Int8Scheme

__all__ = [
    "COMMUNITY",
    "DEFAULT",
    "Examination",
    "Int8Linear",
    "Int8Scheme",
    "backends_for",
    "dequantize",
    "examine",
    "int8_matmul",
    "quantize_activation",
    "quantize_weight",
    "self_test",
]
