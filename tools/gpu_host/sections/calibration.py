"""Section f: GPTQ of the 0.5B shape on the host's device, its parts, and its integers beside a CPU's."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from make_checkpoint import config, write_checkpoint

from gpu_host import bundle
from gpu_host.section import Figure, Host, Row
from h1export.artifact.staging import Stage
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Ids
from h1export.progress import SILENT
from h1export.quantize.calibration import Calibration
from h1export.quantize.device import CPU_DEVICE, ComputeDevice
from h1export.quantize.layers import weights_by_input
from h1export.quantize.methods.gptq_model import solve_model
from h1export.quantize.methods.select import uncalibrated_integers
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights
