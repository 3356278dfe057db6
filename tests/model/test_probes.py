"""Names of values that hold probes, whole or side by side."""

from __future__ import annotations

import numpy as np

from h1export.model.falcon_h1.probes import label, probes_in


def test_a_name_says_which_columns_are_which_probe() -> None:
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert label({"0.mixed": None}) == "probe.0.mixed"
    name = label({"1.conv_input": (1, 4), "1.gate": (0, 1)})
    assert name == "probe.1.conv_input[1:4]+1.gate[0:1]"
    assert probes_in("probe.0.mixed", value)["0.mixed"] is value
    found = probes_in(name, value)
    assert np.array_equal(found["1.conv_input"], value[..., 1:])
    assert np.array_equal(found["1.gate"], value[..., :1])
