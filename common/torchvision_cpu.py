"""Makes torchvision importable beside a CPU build of torch.

The torchvision wheels of the package index carry operators linked against CUDA. Beside a CPU torch these cannot be
loaded, and importing torchvision (which transformers, diffusers, open_clip and vLLM all do) then fails with "operator
torchvision::nms does not exist": it attaches fake implementations to operators that were never defined.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# The operators live as long as the library object that defined them.
_library: Any = None


def patch() -> None:
    """Defines the schemas torchvision's import needs, only if its compiled operators cannot be loaded.

    Call it in every process before anything imports torchvision. Where the operators load (CUDA machines, a torchvision
    built for CPU) they are loaded, as torchvision's own import would do, and nothing else changes. Repeated calls and
    calls after the import do nothing. Where the schemas stand in, calling `torchvision.ops.nms` raises
    `RuntimeError`; everything in torchvision written in Python works.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    import torch

    with contextlib.suppress(OSError):
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    if hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
