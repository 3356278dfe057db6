"""A key of config.json is judged by what transformers does with it: random keys and values, and its logits."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_configs import PUBLISHED
from safetensors.torch import save_file
from transformers import FalconH1Config as TransformersConfig
from transformers import FalconH1ForCausalLM

from h1export.errors import H1ExportError
from h1export.graphs.model import FalconH1
from h1export.graphs.on_device import empty_states
from h1export.model.falcon_h1.config import USED_KEYS, FalconH1Config
from h1export.model.falcon_h1.ignored_keys import DTYPES, KINDS, ignored_keys, told

SMALL: dict[str, Any] = {
    "model_type": "falcon_h1",
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "mamba_d_ssm": 8,
    "mamba_n_heads": 2,
    "mamba_d_head": 4,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
    "initializer_range": 0.3,
    "key_multiplier": 0.7,
    "rope_theta": 50.0,
}
IDS = torch.arange(18)[None]
SAME = 2e-5  # logits of about 1; float32 in another order of additions
# Fields of the report only: a context length, the ids of special tokens, and the chunk, which is carried.
NOT_THE_MODEL = {"max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id", "mamba_chunk_size"}
ROPE = [
    {"rope_type": "default"},
    {"type": "default", "factor": 2.0},
    {"rope_type": "linear", "factor": 1.0},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 8192},
    {"rope_type": "proportional"},
    {"rope_type": "proportional", "factor": 2.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.4},
    *(
        {"rope_type": "longrope", "factor": 1.0, "short_factor": [short] * 3, "long_factor": [1.0] * 3}
        for short in (1.0, 2.0)
    ),
    {"rope_type": "default", "rope_theta": 7.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"hybrid": {"rope_type": "default", "rope_theta": 7.0}},
]
SAYS = [None, {}, True, False, 1.0, "auto", "silu", "swish", "default", ["hybrid"] * 2, [0, 1], *ROPE]
NO_KIND = ["x", "4", 4, -1, 0, 4.5, [], ["x"], [[]], {"a": 1}, {"0": "x"}, "float32", "float8_e4m3fn", "zeros"]
OTHERS = {
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "partial_rotary_factor": [1.0, 0.5],
    "is_causal": [True, False],
    "attn_layer_indices": [[0, 1], [0]],
    "layers_block_type": [["hybrid"] * 2],
    "sliding_window": [4, 4096],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.1}}, {"0": {}, "1": {}}, {"1": {"rms_norm_eps": 1e-5}}],
    "hidden_act": ["gelu"],
    "auto_map": [{"AutoTokenizer": ["x", None]}],
    "no_such_key": [1],
}


def drawn() -> dict[str, list[Any]]:
    """Key -> values: transformers' own defaults, the published ones, and values that say nothing or something."""
    found: dict[str, list[Any]] = {key: list(values) for key, values in OTHERS.items()}
    saved = json.loads(TransformersConfig().to_json_string(use_diff=False))
    for config in (saved, *PUBLISHED.values()):
        for key, value in config.items():
            found.setdefault(key, []).append(value)
    for field in dataclasses.fields(TransformersConfig):
        found.setdefault(field.name, []).append(None)
    for key in ("model_type", "dtype", "torch_dtype"):  # another model; and what only from_pretrained reads, below
        del found[key]
    return found


DRAWN = drawn()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The small model's."""
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = FalconH1ForCausalLM(
        TransformersConfig.from_dict(copy.deepcopy(SMALL))
    ).state_dict()
    return found


@pytest.fixture(scope="module")
def logits(weights: dict[str, torch.Tensor]) -> Callable[[dict[str, Any]], torch.Tensor | None]:
    """logits(config) -> transformers' logits on the small model's weights; None where transformers refuses it."""

    def run(config: dict[str, Any]) -> torch.Tensor | None:
        try:
            model: Any = FalconH1ForCausalLM(TransformersConfig.from_dict(copy.deepcopy(config))).eval()
            model.load_state_dict(weights)
            with torch.no_grad():
                return model(IDS, return_dict=True).logits
        except Exception:  # it raises a dozen kinds
            return None

    return run


@pytest.fixture(scope="module")
def our_logits(weights: dict[str, torch.Tensor]) -> Callable[[FalconH1Config], torch.Tensor]:
    """our_logits(config) -> the logits of graphs/model.py, which every target's graph is traced from."""
    made: dict[FalconH1Config, torch.Tensor] = {}

    def run(config: FalconH1Config) -> torch.Tensor:
        if config not in made:
            cpu = torch.device("cpu")
            model = FalconH1(config).eval()
            model.load_state_dict(weights)
            states = empty_states(config, 1, cpu, dtype=torch.float32)
            with torch.no_grad():
                made[config], _ = model(IDS, torch.ones_like(IDS), states)
        return made[config]

    return run


def model_of(config: FalconH1Config) -> dict[str, Any]:
    """The fields that decide the weights' meaning."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_THE_MODEL}


def parsed(config: dict[str, Any]) -> FalconH1Config | None:
    try:
        return FalconH1Config.from_config(copy.deepcopy(config))
    except H1ExportError:
        return None


CHANGES = st.sampled_from(sorted(DRAWN)).flatmap(
    lambda key: st.tuples(st.just(key), st.sampled_from(DRAWN[key]) | st.sampled_from(SAYS))
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(change=CHANGES)
def test_a_key_counts_exactly_where_transformers_computes_something_else(
    logits: Callable[[dict[str, Any]], torch.Tensor | None],
    our_logits: Callable[[FalconH1Config], torch.Tensor],
    change: tuple[str, Any],
) -> None:
    """Equal logits: accepted as the same model. Others: refused, or read as a model that is another in our config too.

    Whatever is accepted and runs in transformers, ours computes the same logits with it.

    What transformers cannot load at all may only be accepted where it says nothing: as null, or as the same model.
    """
    key, value = change
    config = SMALL | {key: value}
    reference = logits(SMALL)
    assert reference is not None
    found = logits(config)
    ours = parsed(config)
    base = FalconH1Config.from_config(SMALL)
    if found is not None and ours is not None:
        torch.testing.assert_close(our_logits(ours), found, rtol=0, atol=SAME, msg=f"{key} = {value!r}")
    if found is not None and torch.equal(found, reference):
        assert ours is not None, f"{key} = {value!r} changes nothing, and is refused"
        if key in ("tie_word_embeddings", "mamba_norm_before_gate"):  # switches without a use in this model
            return
        assert model_of(ours) == model_of(base)
    elif found is not None and ours is not None and key != "mamba_chunk_size":
        # another order of additions is rounding; the exported model then may be the base
        same = torch.allclose(found, reference, atol=1e-5)
        assert (model_of(ours) == model_of(base)) == same, f"{key} = {value!r}"
    elif found is None and ours is not None and value is not None:
        # the tensors of such a model have other shapes, which WeightStore refuses, or the value says nothing
        assert key in USED_KEYS or value in ({}, [], ["hybrid"] * SMALL["num_hidden_layers"])


@pytest.fixture(scope="module")
def loads(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], bool]:
    """loads(config) -> whether transformers' from_pretrained makes a model of it that runs, with its own defaults."""
    folder = tmp_path_factory.mktemp("loads")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def run(config: dict[str, Any]) -> bool:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            model: Any = FalconH1ForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                model(IDS)
        except Exception:  # it raises a dozen kinds
            return False
        return True

    return run


@pytest.mark.parametrize("key", [*sorted(KINDS), "mamba_expand"])
def test_values_that_transformers_cannot_use_are_refused(key: str, loads: Callable[[Any], bool]) -> None:
    """A whole number in the place of another number is none of them: only the newest transformers minds it."""
    for value in NO_KIND:
        number = type(value) is int and key in ("attention_dropout", "initializer_range")
        assert number or loads(SMALL | {key: value}) == (parsed(SMALL | {key: value}) is not None), value
    with pytest.raises(H1ExportError, match=f"key '{key}' is .*; expected") as caught:
        FalconH1Config.from_config(SMALL | {key: ["x"]}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_names_of_dtypes_are_torchs(name: str, loads: Callable[[Any], bool]) -> None:
    for key in ("dtype", "torch_dtype"):
        assert loads(SMALL | {key: name})
        assert parsed(SMALL | {key: name}) is not None
    assert loads(SMALL | {"dtype": name, "torch_dtype": "x"})
    assert parsed(SMALL | {"dtype": name, "torch_dtype": "x"}) is not None


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_config_is_read(name: str) -> None:
    config = FalconH1Config.from_config(PUBLISHED[name])
    assert config.num_hidden_layers == PUBLISHED[name]["num_hidden_layers"]
    assert config.rope_theta == 1e11


def test_what_is_ignored_is_named() -> None:
    tiny, base = (
        ignored_keys(PUBLISHED[name], USED_KEYS) for name in ("Falcon-H1-Tiny-90M-Base", "Falcon-H1-0.5B-Base")
    )
    assert tiny == ("expansion_factor", "sliding_window", "time_step_rank")
    assert base == ()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"no_such": 1, "another": {}}, ("another", "no_such")),
        ({"mamba_use_mlp": False}, ("mamba_use_mlp",)),
        ({"attn_layer_indices": [0, 1], "mamba_use_mlp": True}, ()),
        ({"attn_layer_indices": [0]}, ("attn_layer_indices",)),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, ("rope_parameters.factor",)),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 7.0}}, ("rope_parameters",)),
    ],
)
def test_the_names_of_what_is_ignored(config: dict[str, Any], names: tuple[str, ...], tmp_path: Path) -> None:
    assert ignored_keys(SMALL | config, USED_KEYS) == names
    (tmp_path / "config.json").write_text(json.dumps(SMALL | config), encoding="utf-8")
    assert FalconH1Config.ignored(tmp_path) == names


def test_names_from_a_file_are_told_shortly() -> None:
    text = told(tuple(f"{number:02d}" + "x" * 100 for number in range(30)))
    assert len(text) < 600
    assert text.endswith("and 18 more")
