"""The integer rule: a scheme decides precisions, a method makes integers, and every target takes both from one Integers."""

from h1export.core.quant.dequantized import dequantized_blocks
from h1export.core.quant.integers import Integers, QuantizedBlock, Rounded, Rounding, quantized_blocks
from h1export.core.quant.precision import Precision
from h1export.core.quant.ready import Ready, need_symmetric
from h1export.core.quant.rtn import quantize_rows
from h1export.core.quant.scheme import Method, QuantName, QuantScheme
from h1export.core.quant.search import search_rows
from h1export.core.quant.tensor import QuantizedTensor

__all__ = [
    "Integers",
    "Method",
    "Precision",
    "QuantName",
    "QuantScheme",
    "QuantizedBlock",
    "QuantizedTensor",
    "Ready",
    "Rounded",
    "Rounding",
    "dequantized_blocks",
    "need_symmetric",
    "quantize_rows",
    "quantized_blocks",
    "search_rows",
]
