"""The integer rule: one function decides precisions, one makes integers, and every target holds the same ones."""

from h1export.core.quant.dequantized import dequantized_blocks
from h1export.core.quant.rtn import QuantizedBlock, quantize_rows, quantized_blocks
from h1export.core.quant.scheme import Precision, QuantName, QuantScheme
from h1export.core.quant.tensor import QuantizedTensor

__all__ = [
    "Precision",
    "QuantName",
    "QuantScheme",
    "QuantizedBlock",
    "QuantizedTensor",
    "dequantized_blocks",
    "quantize_rows",
    "quantized_blocks",
]
