"""The three h1 ops: the contract between the front end and the targets.

Each op is one folder: its schema, written once as the signature of its eager reference; its fake kernel; native kernels
beside them. Importing this package registers all three with PyTorch.
"""

import torch

from h1export.plugins.attention.op import attention
from h1export.plugins.causal_conv.op import causal_conv
from h1export.plugins.ssm_scan.op import ssm_scan

h1 = torch.ops.h1  # the namespace, registered: take it from here

__all__ = ["attention", "causal_conv", "h1", "ssm_scan"]
