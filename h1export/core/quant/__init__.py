"""The integer rule: a scheme decides precisions, a method makes integers, and every target takes both from one Integers."""

from h1export.core.quant.integers import Integers, QuantizedBlock, Rounded, quantized_blocks
from h1export.core.quant.precision import Precision
from h1export.core.quant.rtn import quantize_rows
from h1export.core.quant.scheme import QuantName, QuantScheme
from h1export.core.quant.tensor import QuantizedTensor

__all__ = [
    "Integers",
    "Precision",
    "QuantName",
    "QuantScheme",
    "QuantizedBlock",
    "QuantizedTensor",
    "Rounded",
    "quantize_rows",
    "quantized_blocks",
]
