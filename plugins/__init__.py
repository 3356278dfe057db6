"""The three h1 ops that a traced Falcon-H1 graph contains: `h1::attention`, `h1::causal_conv` and `h1::ssm_scan`.

"Op" means a PyTorch custom operator here; a TensorRT plugin, which implements two of the ops on a GPU, is in
targets/tensorrt/plugin. The ops are the contract between the traced model and the targets: each target translates them.

The folder of an op holds:

- `op.py`: the schema (the signature of the function), the exact eager reference, and the fake kernel for tracing.
  Read this file first.
- `kernels.py`: the GPU kernels in Triton, if there are any.
- `dispatch.py`: what a call on a CUDA device runs: the kernels where they fit the call, or else the reference.
- `launch.py`: the kernels, grids and arguments that one call launches (`ssm_scan` keeps its tile sizes in `tiles.py`).

The folder `gpu` holds the code that the GPU kernels of all ops share. Importing this package registers the ops with
PyTorch, for every device; Triton is imported by the first call on a CUDA device.
"""

import torch

from h1export.plugins.attention.op import attention
from h1export.plugins.causal_conv import dispatch as conv_dispatch
from h1export.plugins.causal_conv.op import causal_conv
from h1export.plugins.ssm_scan import dispatch as scan_dispatch
from h1export.plugins.ssm_scan.op import ssm_scan

causal_conv.register_kernel("cuda")(conv_dispatch.causal_conv)
ssm_scan.register_kernel("cuda")(scan_dispatch.ssm_scan)
h1 = torch.ops.h1  # imported from here, the namespace always has its ops registered

__all__ = ["attention", "causal_conv", "h1", "ssm_scan"]
