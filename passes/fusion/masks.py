"""What the two attention passes agree on about masks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def lowest_bias(dtype: ir.DataType) -> float:
    """Half the lowest number of the type: no score can lift it above 0, none can push it out of the type's range."""
    kind = np.float16 if dtype == ir.DataType.FLOAT16 else np.float32
    return float(np.finfo(kind).min) / 2
