"""LoraAdapter: a low-rank adapter in PEFT's layout, whose products are added to a checkpoint's rows as they are read.

For a linear layer X with a weight [rows, columns] = [out_features, in_features] the file holds

    X.lora_A.weight  float [rank, columns]
    X.lora_B.weight  float [rows, rank]

and the merged weight is weight + scaling * B A. An embedding has X.lora_embedding_A [rank, rows] and X.lora_embedding_B
[columns, rank], and the merged table is weight + scaling * (B A)^T. The scaling is alpha / rank, or alpha / sqrt(rank)
with use_rslora.

Source: PEFT's ``LoraConfig``, ``LoraLayer.update_layer`` and ``get_delta_weight``; Hu et al. 2021, "LoRA".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from h1export.checkpoint.lora_config import ADAPTER_CONFIG, LoraConfig
from h1export.checkpoint.safetensors_header import FLOATS, TensorEntry, read_header
from h1export.checkpoint.tensor_names import plain_name
from h1export.errors import H1ExportError
from h1export.forms import read_bytes
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, TensorShapes, projection_of

if TYPE_CHECKING:  # the store reads through adapters
    from h1export.checkpoint.store import WeightStore

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
# the name of a factor: that of its module, then which factor it is; an adapter's own name may come in between
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])(\.[^.]+)??(?P<weight>\.weight)?")
NOT_DAMAGED = "give the adapter of this model, or save it again with save_pretrained"


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight [rows, columns]: scaling * left right.

    Attributes:
        left: [rows, rank], or [rank, rows] for an embedding.
        right: [rank, columns], or [columns, rank] for an embedding.
        scaling: the factor of the product.
        table: whether the weight is an embedding.
    """

    left: TensorEntry
    right: TensorEntry
    scaling: float
    table: bool

    def added(self, block: Array, start: int) -> Array:
        """Return ``block``, float32 rows from ``start`` on, with the product added in float64 and rounded once.

        The products of the ranks are added one after the other, so that no bit depends on where a block begins.
        """
        stop = start + len(block)
        if self.table:
            left = self.left.floats(columns=slice(start, stop)).T
            right = self.right.floats().T
        else:
            left = self.left.floats(slice(start, stop))
            right = self.right.floats()
        columns = np.ascontiguousarray(left.T).astype(np.float64) * self.scaling
        total: npt.NDArray[np.float64] = block.astype(np.float64)
        product = np.empty_like(total)
        for column, row in zip(columns, right.astype(np.float64), strict=True):
            np.multiply(column[:, None], row, out=product)
            total += product
        with np.errstate(over="ignore"):  # a value that is not finite is refused where a weight is used
            return total.astype(np.float32)


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter, matched to a checkpoint.

    Attributes:
        folder: where it is from.
        products: checkpoint tensor -> what is added to it, in order.
        sha256: over the names, shapes, scaling factors and bytes of the products; nothing of ``folder``'s name.
    """

    folder: Path
    products: Mapping[str, tuple[LowRank, ...]] = field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def open(cls, folder: Path, store: WeightStore, shapes: TensorShapes) -> LoraAdapter:
        """Read the adapter in ``folder`` and match its matrices to weights of these ``shapes``; no matrix is loaded.

        Raises:
            H1ExportError: no LoRA adapter in PEFT's layout, one that does more than low-rank products can, or matrices
                that do not fit the model.
        """
        config = LoraConfig.load(folder)
        entries = {entry.name: entry for entry in read_header(_weights_file(folder))}
        products: dict[str, list[LowRank]] = {}
        for name, product in _products(entries, config, shapes, store=store):
            products.setdefault(name, []).append(product)
        found = {name: tuple(each) for name, each in products.items()}
        if not found:
            raise H1ExportError(folder / ADAPTER_WEIGHTS, "holds no matrix of LoRA", NOT_DAMAGED)
        return cls(folder, found, _sha256(found))

    def applied(self, name: str, block: Array, start: int) -> Array:
        """Return ``block``, rows from ``start`` on of checkpoint tensor ``name``, with the adapter merged."""
        for product in self.products.get(name, ()):
            block = product.added(block, start)
        return block


def open_adapters(folders: Sequence[Path], store: WeightStore, shapes: TensorShapes) -> tuple[LoraAdapter, ...]:
    """Return the adapters in ``folders``, in order.

    Raises:
        H1ExportError: an adapter that does not fit ``store``, or a store that is in integers already.
    """
    if folders and store.packed_format is not None:
        what = "the checkpoint is quantised already, and an adapter cannot be merged into integers"
        raise H1ExportError("--adapter", what, "give the unquantised checkpoint that it was trained on")
    return tuple(LoraAdapter.open(folder, store, shapes) for folder in folders)


def _weights_file(folder: Path) -> Path:
    file = folder / ADAPTER_WEIGHTS
    if file.is_file():
        return file
    if (folder / ADAPTER_PICKLE).exists():
        what = f"only pickle weights ({ADAPTER_PICKLE}), which can run code when opened"
        raise H1ExportError(folder, what, "convert the adapter to safetensors where you trust it")
    raise H1ExportError(folder, f"has no {ADAPTER_WEIGHTS}", "give the folder that PEFT's save_pretrained wrote")


def _products(
    entries: Mapping[str, TensorEntry], config: LoraConfig, shapes: TensorShapes, *, store: WeightStore
) -> Iterator[tuple[str, LowRank]]:
    """Yield (checkpoint tensor, product) by module name; every tensor of the file must belong to one."""
    sides: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    for name, entry in sorted(entries.items()):
        where = f'{entry.file}: tensor "{name}"'
        plain = name.removeprefix(PREFIX)
        match = FACTOR.fullmatch(plain)
        if match is None:
            _check_copy(plain, entry, where, store=store, shapes=shapes)
            continue
        pair = sides.setdefault((match["module"], match["table"] is not None), {})
        if match["side"] in pair:
            raise H1ExportError(where, "is there twice, under two names", NOT_DAMAGED)
        if entry.dtype not in FLOATS:
            raise H1ExportError(where, f"has dtype {entry.dtype!r}", f"only {', '.join(FLOATS)} adapters are merged")
        pair[match["side"]] = entry
    for (module, table), pair in sides.items():
        yield _product(module, table, pair, config=config, shapes=shapes)


def _product(
    module: str, table: bool, pair: Mapping[str, TensorEntry], *, config: LoraConfig, shapes: TensorShapes
) -> tuple[str, LowRank]:
    one = next(iter(pair.values()))
    where = f'{one.file}: tensor "{one.name}"'
    if len(pair) < 2:
        raise H1ExportError(where, "has no partner, lora_A or lora_B", NOT_DAMAGED)
    name = f"{module}.weight"
    if name == LM_HEAD and LM_HEAD not in shapes:  # tied: PEFT merges into the table that both share
        name = EMBEDDING
        if table:
            raise H1ExportError(where, "is an embedding's, and the module is a product", NOT_DAMAGED)
    elif projection_of(name) is None or name not in shapes:
        plain = plain_name(name)
        if plain != name and plain in shapes:
            what = f'belongs to "{plain}" under another name, which a wrapper of the model gave it'
            raise H1ExportError(where, what, "save the adapter of the model itself, or rename its tensors")
        raise H1ExportError(where, "belongs to no projection of this model", NOT_DAMAGED)
    elif table != (name == EMBEDDING):
        raise H1ExportError(where, "is of another kind than the module it names", NOT_DAMAGED)
    rows, columns = shapes[name]
    rank = config.rank(module)
    a, b = pair["A"], pair["B"]
    expected = ((rank, rows), (columns, rank)) if table else ((rank, columns), (rows, rank))
    for entry, shape in zip((a, b), expected, strict=True):
        if entry.shape != shape:
            what = f"has shape {list(entry.shape)}, and the model and {ADAPTER_CONFIG} ask for {list(shape)}"
            raise H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, NOT_DAMAGED)
    left, right = (a, b) if table else (b, a)
    return name, LowRank(left, right, config.scaling(module), table=table)


def _check_copy(name: str, entry: TensorEntry, where: str, *, store: WeightStore, shapes: TensorShapes) -> None:
    """Accept a copy of a weight of the base model, which PEFT saves beside adapters of embeddings; refuse any other."""
    base = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    if base == LM_HEAD and LM_HEAD not in shapes:
        base = EMBEDDING
    if base in shapes and entry.dtype in FLOATS and entry.shape == shapes[base]:
        blocks = store.row_ranges([base], 1 << 24)
        if all(
            np.array_equal(entry.floats(slice(start, stop)), store.rows(base, start, stop)) for start, stop in blocks
        ):
            return
        what = "is another than the model's own: the adapter replaces whole weights (modules_to_save)"
        raise H1ExportError(where, what, "merge it with PEFT's merge_and_unload, and give the merged model")
    raise H1ExportError(where, "is no matrix of LoRA and no weight of this model", NOT_DAMAGED)


def _sha256(products: Mapping[str, tuple[LowRank, ...]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(products):
        for product in products[name]:
            for entry in (product.left, product.right):
                described = [name, product.table, product.scaling, entry.dtype, entry.shape]
                digest.update(json.dumps(described).encode())
                for block in entry.blocks():
                    digest.update(block.data)
    return digest.hexdigest()


def check_is_model(folder: Path, config_file: str) -> None:
    """Refuse a folder that holds an adapter in the place of a model.

    Raises:
        H1ExportError: there is an adapter_config.json and no ``config_file``; the error names the base model, if its
            name is a plain one.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / config_file).exists():
        return
    base = "its base model"
    try:
        found = json.loads(read_bytes(folder / ADAPTER_CONFIG))["base_model_name_or_path"]
        if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9._/-]{1,100}", found):
            base = f"its base model, {found},"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    what = "is an adapter and not a model"
    raise H1ExportError(folder, what, f"give {base} as MODEL, and this folder with --adapter")


def check_no_other(folder: Path, adapters: Sequence[Path]) -> None:
    """Refuse a model whose folder holds an adapter that is none of ``adapters``: transformers loads both together.

    Raises:
        H1ExportError: there is such an adapter.
    """
    held = any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE))
    if (
        not held
        or not (folder / ADAPTER_CONFIG).is_file()
        or any(given.exists() and folder.samefile(given) for given in adapters)
    ):
        return
    what = "holds an adapter beside the model, and transformers loads the two together"
    raise H1ExportError(folder, what, "give the folder with --adapter too, or move the adapter out of it")


def described(adapters: Sequence[LoraAdapter]) -> list[dict[str, Any]]:
    """Return what a manifest records of adapters, in the order in which they are merged."""
    return [{"sha256": adapter.sha256, "tensors": len(adapter.products)} for adapter in adapters]
