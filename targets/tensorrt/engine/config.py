"""EngineConfig: what a builder needs to make an engine of an artifact's network. recipe.json stores it.

The same settings can be given to TensorRT's own command line tool; ``trtexec`` returns that command.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta

from h1export import forms
from h1export.forms import Sha256
from h1export.model.falcon_h1.states import BATCH, SEQUENCE
from h1export.targets.tensorrt.network.layout import DECODE, MODEL, PREFILL, Ports, Profile, profiles
from h1export.targets.tensorrt.options import RuntimeName, TensorRTOptions

RECIPE = "recipe.json"
ENGINE = "model.engine"
TRTEXEC = "trtexec.sh"
LIBRARY = "plugin/libh1export_plugin.so"
ALIASED: Final = "ALIASED_PLUGIN_IO_10_03"  # preview feature: plugins update states in place
RECORDABLE: Final = "REQUIRE_USER_ALLOCATION"  # builder flag of TensorRT-RTX: calls can be recorded as CUDA graphs
TRTEXEC_NAMES = {ALIASED: "aliasedPluginIO1003"}
# TensorRT 10.15 is the first version with TensorScatter and RotaryEmbedding.
VERSIONS: Mapping[RuntimeName, str] = {"rtx": ">=1.7,<2", "tensorrt": ">=10.15,<12"}
# The default compute capabilities. TensorRT-RTX also supports 75 and 121, and neither 90 nor 100.
RTX_ARCHITECTURES = (80, 86, 89, 120)

Shape = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=8)]
Capability = Annotated[int, Meta(ge=10, le=999)]


@dataclass(frozen=True)
class Shapes:
    """The shapes of an optimization profile.

    Attributes:
        name: name of the profile.
        inputs: input -> its smallest, optimal and largest shape.
    """

    name: str
    inputs: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class EngineConfig:
    """The settings of an engine build.

    Attributes:
        runtime: the runtime whose builder makes the engine.
        versions: version specifier of that runtime. Those of TensorRT follow its documentation and were not run.
        architectures: compute capabilities that the engine is for; empty: that of the GPU in the building machine.
        profiles: the optimization profiles for decode and for prefill.
        hashes: file name -> sha256 of the files that the engine is made of.
        preview_features: TensorRT's names of the preview features to enable.
        builder_flags: TensorRT's names of the builder flags to set.
        network: file name of the ONNX network.
        plugin: file name of the plugin library.
        engine: file name of the engine.
    """

    runtime: RuntimeName
    versions: str
    architectures: tuple[Capability, ...]
    profiles: tuple[Shapes, ...]
    hashes: Mapping[str, Sha256]
    preview_features: tuple[Literal["ALIASED_PLUGIN_IO_10_03"], ...] = (ALIASED,)
    builder_flags: tuple[Literal["REQUIRE_USER_ALLOCATION"], ...] = ()
    network: str = MODEL
    plugin: str = LIBRARY
    engine: str = ENGINE

    @classmethod
    def of(
        cls,
        runtime: RuntimeName,
        architectures: tuple[int, ...],
        inputs: Ports,
        *,
        options: TensorRTOptions,
        hashes: Mapping[str, str],
    ) -> EngineConfig:
        """Return the settings for a network with the given inputs."""
        shapes = tuple(_shapes(profile, inputs) for profile in profiles(options.max_batch, options.max_context))
        of_rtx = runtime == "rtx"
        return cls(
            runtime,
            VERSIONS[runtime],
            architectures if of_rtx else (),
            profiles=shapes,
            hashes=hashes,
            builder_flags=(RECORDABLE,) if of_rtx else (),
        )

    def __post_init__(self) -> None:
        if (self.network, self.plugin, self.engine) != (MODEL, LIBRARY, ENGINE):
            raise ValueError("it names other files than those of an artifact")
        if self.versions != VERSIONS[self.runtime]:
            raise ValueError("it is for other versions of the runtime than this h1export")
        if {profile.name for profile in self.profiles} != {DECODE, PREFILL} or len(self.profiles) != 2:
            raise ValueError("its profiles are not one for decode and one for prefill")

    def to_json(self) -> str:
        """Return the content of recipe.json, with sorted keys."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> EngineConfig:
        """Read recipe.json of the artifact in ``folder``.

        Raises:
            H1ExportError: the file is missing or holds something else.
        """
        what = "a description of an engine build"
        return forms.read(folder / RECIPE, cls, what=what, next_step="build the artifact again with --target trt")

    def trtexec(self) -> str:
        """Return the command line of TensorRT's trtexec that builds the engine, to be run in the artifact's folder."""
        words = [
            "trtexec",
            f"--onnx={self.network}",
            f"--saveEngine={self.engine}",
            f"--staticPlugins={self.plugin}",
            "--stronglyTyped",
        ]
        words += [f"--preview=+{TRTEXEC_NAMES[feature]}" for feature in self.preview_features]
        for index, profile in enumerate(self.profiles):
            words.append(f"--profile={index}")
            for place, which in enumerate(("min", "opt", "max")):
                sizes = (
                    f"{name}:{'x'.join(map(str, shapes[place]))}" for name, shapes in sorted(profile.inputs.items())
                )
                words.append(f"--{which}Shapes={','.join(sizes)}")
        return shlex.join(words)


def _shapes(profile: Profile, inputs: Ports) -> Shapes:
    """Return the shapes of every input in ``profile``; fixed dimensions stay as they are."""

    def shape(dims: tuple[int | str, ...], batch: int, tokens: int) -> Shape:
        return tuple(dim if isinstance(dim, int) else {BATCH: batch, SEQUENCE: tokens}[dim] for dim in dims)

    def shapes(dims: tuple[int | str, ...]) -> tuple[Shape, Shape, Shape]:
        smallest = shape(dims, 1, 1)
        optimal = shape(dims, profile.batch, profile.usual)
        return smallest, optimal, shape(dims, profile.batch, profile.tokens)

    return Shapes(profile.name, {name: shapes(dims) for name, (_, dims) in inputs.items()})
