"""The size of a weight beyond which onnxruntime's own kernel of MatMulNBits ends the process, or is not made.

Without rounded activations it first dequantises a weight of int8 whole, and counts its elements in 32 bits
(onnxruntime 1.32: a segmentation fault at 262,160 x 8,224). Of int4, and with rounded activations, it takes such
weights, and so do h1export's kernels. Of the portable graph's operators it makes no product beyond the same size.
"""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.tensors import EMBEDDING, tensor_shapes
from h1export.targets.onnxruntime.options import Graph

MOST_ELEMENTS = 2**31 - 1


def check(artifact: Artifact, graph: Graph, level: int) -> None:
    """Check that onnxruntime's own kernels take the products of ``artifact`` at this accuracy level.

    Raises:
        H1ExportError: A weight is too large.
    """
    portable = graph == "portable"
    if level and not portable:
        return
    next_step = "run h1export's own kernels (--kernels native), or use int4" if graph == "cpu" else "use --graph cpu"
    shapes = tensor_shapes(artifact.config)
    for weight in artifact.manifest.weights:
        names = [part.tensor for part in weight.parts]
        only_gathered = names == [EMBEDDING] and not artifact.config.tie_word_embeddings
        elements = sum(shapes[name][0] * shapes[name][1] for name in names)
        if (weight.bits == 8 or portable) and not only_gathered and elements > MOST_ELEMENTS:
            what = f"{names[0]} has {elements} elements, and onnxruntime takes {MOST_ELEMENTS} in such a product"
            raise H1ExportError(artifact.folder, what, next_step)
