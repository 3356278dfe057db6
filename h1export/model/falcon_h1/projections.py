"""The matrices of a Falcon-H1 model in one table: nine projections a layer, the embedding and the head.

Every other list of matrices is a view of ``PROJECTIONS``: the shapes of the checkpoint's tensors, what is quantised,
which projections share an input, what activation-aware scaling may divide, where probes are, and which op a wrong probe
points to. What the family computes is described in docs/concepts.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.probes import ProbePoint

# Two modules, named within a layer, and one tensor of the checkpoint.
INPUT_NORM = "input_layernorm"  # before the layer's two mixers
MLP_NORM = "pre_ff_layernorm"  # before the layer's MLP
FINAL_NORM = "model.final_layernorm.weight"

Size = Callable[[FalconH1Config], int]
Runs = tuple[tuple[int, float], ...]  # row factors, run-length coded as in Multiplier.runs (checkpoint/weight_expr.py)


class ModelPart(StrEnum):
    """The part of the model that a matrix belongs to, as reports name it."""

    MAMBA = "mamba"
    ATTENTION = "attention"
    MLP = "MLP"
    EMBEDDING = "embedding"
    HEAD = "head"


@dataclass(frozen=True)
class ProjectionInput:
    """An activation that one or more projections are multiplied by (µP factors aside).

    Attributes:
        name: a description in words.
        produced_by: tensors, named within the layer, whose rows can be divided by factors so that this activation's
            columns are divided by them and nothing else changes but rounding. It is empty where there are no such
            tensors, and may name a tensor, such as a bias, that some architectures do not have.
        point: the probe point that shows this activation; None: no probe shows it.
    """

    name: str
    produced_by: tuple[str, ...] = ()
    point: ProbePoint | None = None


MIXER_INPUT = ProjectionInput("normed residual of the mixers", produced_by=(f"{INPUT_NORM}.weight",))
GATED_SCAN = ProjectionInput("gated scan", produced_by=("mamba.norm.weight",), point=ProbePoint.GATED)
# v_proj produces it, but its rows cannot be divided: values are a state, and states must stay the checkpoint's.
ATTENDED_VALUES = ProjectionInput("attended values", point=ProbePoint.ATTENDED)
MLP_INPUT = ProjectionInput("normed residual of the MLP", produced_by=(f"{MLP_NORM}.weight",))
MLP_PRODUCT = ProjectionInput(
    "product of gate and up",
    produced_by=("feed_forward.up_proj.weight", "feed_forward.up_proj.bias"),
    point=ProbePoint.PRODUCT,
)
HEAD_INPUT = ProjectionInput("normed last residual", produced_by=(FINAL_NORM,))
TOKEN_IDS = ProjectionInput("token ids")  # the embedding's rows are gathered, and nothing is multiplied by them


def _never(_: FalconH1Config) -> bool:
    return False


def _one(_: FalconH1Config) -> float:
    return 1.0


def _ones(_: FalconH1Config) -> Runs:
    return ((0, 1.0),)


@dataclass(frozen=True)
class Projection:
    """One matrix [rows, columns] of the model, once a layer or once a model.

    Attributes:
        name: the module's path in the checkpoint; it is relative to the layer where ``per_layer``.
        part: the part of the model that it belongs to.
        rows: output features.
        columns: input features.
        input: the activation that it is multiplied by; projections with an equal input share it.
        output_points: the probe points that are wrong first when this projection is.
        has_bias: whether the architecture gives it a bias [rows].
        input_multiplier: the µP factor on its input.
        output_multiplier: the µP factors on the rows of its output, bias included.
        per_layer: whether every layer has one.
    """

    name: str
    part: ModelPart
    rows: Size
    columns: Size
    input: ProjectionInput
    output_points: tuple[ProbePoint, ...] = ()
    has_bias: Callable[[FalconH1Config], bool] = _never
    input_multiplier: Callable[[FalconH1Config], float] = _one
    output_multiplier: Callable[[FalconH1Config], Runs] = _ones
    per_layer: bool = True

    @property
    def weight(self) -> str:
        """The name of the matrix as a checkpoint tensor, relative to the layer where ``per_layer``."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """The name of the bias as a checkpoint tensor, relative to the layer where ``per_layer``."""
        return f"{self.name}.bias"

    @property
    def op(self) -> str:
        """The name of the op that multiplies by it, such as "q_proj"."""
        return self.name.rpartition(".")[2]

    def shape(self, config: FalconH1Config) -> tuple[int, int]:
        """(rows, columns) in a model of ``config``."""
        return self.rows(config), self.columns(config)


IN_PROJ = Projection(
    "mamba.in_proj",
    ModelPart.MAMBA,
    rows=lambda c: sum(c.in_proj_parts),
    columns=lambda c: c.hidden_size,
    input=MIXER_INPUT,
    output_points=(ProbePoint.GATE, ProbePoint.CONV_INPUT, ProbePoint.DT),
    has_bias=lambda c: c.mamba_proj_bias,
    input_multiplier=lambda c: c.ssm_in_multiplier,
    output_multiplier=lambda c: tuple(zip(c.in_proj_parts, c.ssm_multipliers, strict=True)),
)
OUT_PROJ = Projection(
    "mamba.out_proj",
    ModelPart.MAMBA,
    rows=lambda c: c.hidden_size,
    columns=lambda c: c.mamba_d_ssm,
    input=GATED_SCAN,
    output_points=(ProbePoint.MIXED,),
    has_bias=lambda c: c.projectors_bias,
    output_multiplier=lambda c: ((0, c.ssm_out_multiplier),),
)
Q_PROJ = Projection(
    "self_attn.q_proj",
    ModelPart.ATTENTION,
    rows=lambda c: c.attention_dim,
    columns=lambda c: c.hidden_size,
    input=MIXER_INPUT,
    output_points=(ProbePoint.QUERY,),
    has_bias=lambda c: c.attention_bias,
    input_multiplier=lambda c: c.attention_in_multiplier,
)
K_PROJ = Projection(
    "self_attn.k_proj",
    ModelPart.ATTENTION,
    rows=lambda c: c.kv_dim,
    columns=lambda c: c.hidden_size,
    input=MIXER_INPUT,
    output_points=(ProbePoint.KEY,),
    has_bias=lambda c: c.attention_bias,
    input_multiplier=lambda c: c.attention_in_multiplier,
    output_multiplier=lambda c: ((0, c.key_multiplier),),
)
V_PROJ = Projection(
    "self_attn.v_proj",
    ModelPart.ATTENTION,
    rows=lambda c: c.kv_dim,
    columns=lambda c: c.hidden_size,
    input=MIXER_INPUT,
    output_points=(ProbePoint.VALUE,),
    has_bias=lambda c: c.attention_bias,
    input_multiplier=lambda c: c.attention_in_multiplier,
)
O_PROJ = Projection(
    "self_attn.o_proj",
    ModelPart.ATTENTION,
    rows=lambda c: c.hidden_size,
    columns=lambda c: c.attention_dim,
    input=ATTENDED_VALUES,
    output_points=(ProbePoint.MIXED,),
    has_bias=lambda c: c.attention_bias,
    output_multiplier=lambda c: ((0, c.attention_out_multiplier),),
)
GATE_PROJ = Projection(
    "feed_forward.gate_proj",
    ModelPart.MLP,
    rows=lambda c: c.intermediate_size,
    columns=lambda c: c.hidden_size,
    input=MLP_INPUT,
    output_points=(ProbePoint.PRODUCT,),
    has_bias=lambda c: c.mlp_bias,
    output_multiplier=lambda c: ((0, c.mlp_multipliers[0]),),
)
UP_PROJ = Projection(
    "feed_forward.up_proj",
    ModelPart.MLP,
    rows=lambda c: c.intermediate_size,
    columns=lambda c: c.hidden_size,
    input=MLP_INPUT,
    output_points=(ProbePoint.PRODUCT,),
    has_bias=lambda c: c.mlp_bias,
)
DOWN_PROJ = Projection(
    "feed_forward.down_proj",
    ModelPart.MLP,
    rows=lambda c: c.hidden_size,
    columns=lambda c: c.intermediate_size,
    input=MLP_PRODUCT,
    output_points=(ProbePoint.RESIDUAL,),  # of the next layer
    has_bias=lambda c: c.mlp_bias,
    output_multiplier=lambda c: ((0, c.mlp_multipliers[1]),),
)
EMBED_TOKENS = Projection(
    "model.embed_tokens",
    ModelPart.EMBEDDING,
    rows=lambda c: c.vocab_size,
    columns=lambda c: c.hidden_size,
    input=TOKEN_IDS,
    per_layer=False,
)
# A tied head is the embedding, so lm_head_multiplier is folded into the final norm and not into this weight.
HEAD = Projection(
    "lm_head",
    ModelPart.HEAD,
    rows=lambda c: c.vocab_size,
    columns=lambda c: c.hidden_size,
    input=HEAD_INPUT,
    per_layer=False,
)

LAYER_PROJECTIONS = (IN_PROJ, OUT_PROJ, Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ)
PROJECTIONS = (EMBED_TOKENS, HEAD, *LAYER_PROJECTIONS)


def _input_groups() -> dict[str, tuple[Projection, ...]]:
    groups: defaultdict[ProjectionInput, list[Projection]] = defaultdict(list)
    for projection in LAYER_PROJECTIONS:
        groups[projection.input].append(projection)
    return {group[0].name: tuple(group) for group in groups.values()}


def _suspect_ops() -> dict[ProbePoint, str]:
    others = {
        ProbePoint.CONV: "convolution",
        ProbePoint.GATED: "scan or its gate",
        ProbePoint.ATTENDED: "attention",
    }
    products = {point: [p.op for p in LAYER_PROJECTIONS if point in p.output_points] for point in ProbePoint}
    return {point: others.get(point) or " or ".join(products[point]) for point in ProbePoint}


# The projections of a layer by the input that they share; a group has the name of its first projection.
INPUT_GROUPS: Mapping[str, tuple[Projection, ...]] = _input_groups()

# Modules of a layer, and the probe point that shows what each reads.
POINTS_READ: Mapping[str, ProbePoint] = {
    INPUT_NORM: ProbePoint.RESIDUAL,
    MLP_NORM: ProbePoint.MIXED,
    **{p.name: p.input.point for p in LAYER_PROJECTIONS if p.input.point is not None},
}

# The ops that are suspect where a probe point is the first to be wrong. Layer 0's residual is an exception: there it is
# the embedding.
SUSPECT_OPS: Mapping[ProbePoint, str] = _suspect_ops()

# The suspects at a residual where one kernel computes the whole MLP, so that its product is not shown.
SUSPECT_MLP = "{}, {} or {}".format(*(p.op for p in LAYER_PROJECTIONS if p.part is ModelPart.MLP))
