"""FalconH1Config: the architecture of one Falcon-H1 model, read from its config.json.

Defaults are those of transformers' ``FalconH1Config``, and the released models often use the opposite. ``USED_KEYS``
are read. ignored_keys.py judges all other keys: one is refused only where its value makes another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG, ConfigReader, read_config, shown
from h1export.model.falcon_h1.ignored_keys import ignored_keys, refuse_other_models
from h1export.model.falcon_h1.rope import rope_theta

MODEL_TYPE = "falcon_h1"
SILU = ("silu", "swish")  # transformers' names of one function

USED_KEYS = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "projectors_bias",
        "mamba_d_ssm",
        "mamba_expand",
        "mamba_n_heads",
        "mamba_d_head",
        "mamba_n_groups",
        "mamba_d_state",
        "mamba_d_conv",
        "mamba_chunk_size",
        "mamba_conv_bias",
        "mamba_proj_bias",
        "mamba_rms_norm",
        "mamba_norm_before_gate",
        "time_step_limit",
        "embedding_multiplier",
        "lm_head_multiplier",
        "key_multiplier",
        "attention_in_multiplier",
        "attention_out_multiplier",
        "ssm_in_multiplier",
        "ssm_out_multiplier",
        "ssm_multipliers",
        "mlp_multipliers",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)


@dataclass(frozen=True)
class FalconH1Config:
    """Architecture of a Falcon-H1 model. Sizes are in elements; multipliers are µP scale factors (1.0 = none).

    Fields have the names of the config.json keys; only ``eos_token_ids`` is ``eos_token_id`` as a tuple.
    ``time_step_limit`` bounds dt after softplus. ``ssm_multipliers`` apply to the parts [z, x, B, C, dt] of in_proj's
    output, and ``mlp_multipliers`` to gate_proj's and down_proj's output.
    Source: transformers ``configuration_falcon_h1.py`` and ``modeling_falcon_h1.py``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    projectors_bias: bool
    mamba_d_ssm: int
    mamba_n_heads: int
    mamba_d_head: int
    mamba_n_groups: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_chunk_size: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    mamba_rms_norm: bool
    mamba_norm_before_gate: bool
    time_step_limit: tuple[float, float]
    embedding_multiplier: float
    lm_head_multiplier: float
    key_multiplier: float
    attention_in_multiplier: float
    attention_out_multiplier: float
    ssm_in_multiplier: float
    ssm_out_multiplier: float
    ssm_multipliers: tuple[float, float, float, float, float]
    mlp_multipliers: tuple[float, float]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def bc_dim(self) -> int:
        """Width of B (and of C): groups x state size."""
        return self.mamba_n_groups * self.mamba_d_state

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: [x | B | C]."""
        return self.mamba_d_ssm + 2 * self.bc_dim

    @property
    def in_proj_parts(self) -> tuple[int, int, int, int, int]:
        """Rows of mamba.in_proj by part: [z | x | B | C | dt]."""
        return (self.mamba_d_ssm, self.mamba_d_ssm, self.bc_dim, self.bc_dim, self.mamba_n_heads)

    @property
    def attention_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def load(cls, folder: Path) -> FalconH1Config:
        """Read ``folder/config.json``.

        Raises:
            H1ExportError: the file is missing, or it is not a Falcon-H1 config that can be exported exactly.
        """
        path = folder / CONFIG
        return cls.from_config(read_config(path), path)

    @staticmethod
    def ignored(folder: Path) -> tuple[str, ...]:
        """Return the names of the keys of ``folder/config.json`` that change nothing and that nobody expects.

        Raises:
            H1ExportError: there is no such file, or it is not a JSON object.
        """
        config = read_config(folder / CONFIG)
        if not isinstance(config, dict):
            raise H1ExportError(folder / CONFIG, "not a JSON object", "give a checkpoint folder in Hugging Face layout")
        return ignored_keys(config, USED_KEYS)

    @classmethod
    def from_config(cls, config: Any, where: object = "config.json") -> FalconH1Config:
        """Returns the checked architecture of a parsed config.json; ``where`` names it in errors."""
        if not isinstance(config, dict):
            raise H1ExportError(where, "not a JSON object", "give a checkpoint folder in Hugging Face layout")
        model_type = config.get("model_type")
        if model_type != MODEL_TYPE:
            raise H1ExportError(
                where, f"model_type is {shown(model_type)}, not {MODEL_TYPE!r}", "give a Falcon-H1 checkpoint"
            )
        read = ConfigReader(config, where)
        refuse_other_models(read)
        if config.get("hidden_act", SILU[0]) not in SILU and config["hidden_act"] is not None:
            raise read.error("hidden_act", f"is {shown(config['hidden_act'])}", "only 'silu' can be exported")
        parsed = _parse(read)
        _check_shapes(parsed, read)
        return parsed


def _parse(read: ConfigReader) -> FalconH1Config:
    hidden = read.size("hidden_size", 4096)
    heads = read.size("num_attention_heads", 32)
    d_ssm = read.optional_size("mamba_d_ssm", 1024)
    if d_ssm is None:
        d_ssm = read.size("mamba_expand", 2) * hidden
    elif read.config.get("mamba_expand") is not None and type(read.config["mamba_expand"]) is not int:
        raise read.error("mamba_expand", f"is {shown(read.config['mamba_expand'])}", "expected a whole number")
    n_heads = read.size("mamba_n_heads", 128)
    d_head = None if read.config.get("mamba_d_head", "auto") == "auto" else read.optional_size("mamba_d_head", None)
    ssm = read.positives("ssm_multipliers", 5)
    mlp = read.positives("mlp_multipliers", 2)
    return FalconH1Config(
        vocab_size=read.size("vocab_size", 128000),
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size", 14336),
        num_hidden_layers=read.size("num_hidden_layers", 32, limit=1024),
        num_attention_heads=heads,
        num_key_value_heads=read.optional_size("num_key_value_heads", 8) or heads,
        head_dim=read.optional_size("head_dim", None) or max(1, hidden // heads),
        rms_norm_eps=read.positive("rms_norm_eps", 1e-5),
        max_position_embeddings=read.size("max_position_embeddings", 8192),
        rope_theta=rope_theta(read),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        attention_bias=read.flag("attention_bias", False),
        mlp_bias=read.flag("mlp_bias", False),
        projectors_bias=read.flag("projectors_bias", False),
        mamba_d_ssm=d_ssm,
        mamba_n_heads=n_heads,
        mamba_d_head=d_head or max(1, d_ssm // n_heads),
        mamba_n_groups=read.size("mamba_n_groups", 1),
        mamba_d_state=read.size("mamba_d_state", 256),
        mamba_d_conv=read.size("mamba_d_conv", 4, limit=256),
        mamba_chunk_size=read.size("mamba_chunk_size", 256),
        mamba_conv_bias=read.flag("mamba_conv_bias", True),
        mamba_proj_bias=read.flag("mamba_proj_bias", False),
        mamba_rms_norm=read.flag("mamba_rms_norm", False),
        mamba_norm_before_gate=read.flag("mamba_norm_before_gate", True),
        time_step_limit=read.interval("time_step_limit", (0.0, math.inf)),
        embedding_multiplier=read.positive("embedding_multiplier", 1.0),
        lm_head_multiplier=read.positive("lm_head_multiplier", 1.0),
        key_multiplier=read.positive("key_multiplier", 1.0),
        attention_in_multiplier=read.positive("attention_in_multiplier", 1.0),
        attention_out_multiplier=read.positive("attention_out_multiplier", 1.0),
        ssm_in_multiplier=read.positive("ssm_in_multiplier", 1.0),
        ssm_out_multiplier=read.positive("ssm_out_multiplier", 1.0),
        ssm_multipliers=(ssm[0], ssm[1], ssm[2], ssm[3], ssm[4]),
        mlp_multipliers=(mlp[0], mlp[1]),
        bos_token_id=read.token_id("bos_token_id", 1),
        eos_token_ids=read.token_ids("eos_token_id", 2),
        pad_token_id=read.token_id("pad_token_id", 0),
    )


def _check_shapes(parsed: FalconH1Config, read: ConfigReader) -> None:
    def need(holds: bool, key: str, what: str) -> None:
        if not holds:
            raise read.error(
                key, what, "the config describes a model that cannot exist; compare it with the checkpoint's source"
            )

    need(
        parsed.num_attention_heads % parsed.num_key_value_heads == 0,
        "num_key_value_heads",
        "does not divide num_attention_heads",
    )
    need(parsed.head_dim % 2 == 0, "head_dim", f"is {parsed.head_dim}, and rotary embeddings need an even one")
    product = parsed.mamba_n_heads * parsed.mamba_d_head
    need(
        product == parsed.mamba_d_ssm,
        "mamba_d_head",
        f"x mamba_n_heads = {product}, but mamba_d_ssm is {parsed.mamba_d_ssm}",
    )
    need(parsed.mamba_n_heads % parsed.mamba_n_groups == 0, "mamba_n_groups", "does not divide mamba_n_heads")
    need(parsed.mamba_d_conv >= 2, "mamba_d_conv", "is 1, and the causal convolution needs at least two taps")
