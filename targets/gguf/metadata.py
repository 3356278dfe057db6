"""The keys of the file: the architecture's sizes, as llama.cpp reads them, and what the file is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.targets.gguf import sdk
from h1export.targets.gguf.tensors import GgufTensor, Source
from h1export.targets.gguf.types import TensorType

OWN_INTEGERS = "h1export.own_integers"
# the name of a file's main type in gguf's LlamaFileType
FILE_TYPES = {TensorType.F32: "ALL_F32"} | {
    kind: f"MOSTLY_{kind.upper()}" for kind in TensorType if kind is not TensorType.F32
}
FILE_TYPES |= {TensorType.Q4_K: "MOSTLY_Q4_K_M", TensorType.Q5_K: "MOSTLY_Q5_K_M"}


def add_keys(writer: Any, config: FalconH1Config, tensors: Iterable[GgufTensor]) -> None:
    """Add the architecture's keys to gguf's ``writer``."""
    gguf = sdk.gguf()
    tensors = tuple(tensors)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[main_type(tensors)]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_d_ssm)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_ssm_group_count(config.mamba_n_groups)
    if own := own_integers(tensors):
        writer.add_array(OWN_INTEGERS, list(own))


def main_type(tensors: Iterable[GgufTensor]) -> TensorType:
    """Return the type that most bytes of matrices outside the embedding and the head have."""
    layers = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    count: Counter[TensorType] = Counter()
    for tensor in layers:
        count[tensor.kind] += tensor.nbytes
    return count.most_common(1)[0][0]


def own_integers(tensors: Iterable[GgufTensor]) -> tuple[str, ...]:
    """Return the names of the tensors whose integers are this target's own, and not those of other targets."""
    return tuple(tensor.name for tensor in tensors if tensor.source in (Source.OWN, Source.SOLVED))
