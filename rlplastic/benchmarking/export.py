"""Time of one action on one thread: the exported graph under onnxruntime beside the actor under torch.

Sizes are those of Unitree's G1 (MuJoCo Playground: 103 observations, 29 joints), whose policy acts every 20 ms. A
controller can live with an action that takes a twentieth of that, always: 99 of 100 have to be below 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch

from rlplastic.agents.flashsac.networks import Actor
from rlplastic.benchmarking.timing import percentiles
from rlplastic.deploy.document import AffineMap
from rlplastic.deploy.policy import INPUT
from rlplastic.exporting.fold import fold
from rlplastic.exporting.graph import onnx_model

OBSERVATIONS, ACTIONS = 103, 29
BOUND = 1000.0
"""Microseconds that the 99th percentile may take."""
CAPTION = "Microseconds for one action, batch 1, one thread. Sizes of the G1: 103 observations, 29 joints; two blocks."


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every width and runtime."""
    widths, calls = ([32], 20) if options.quick else ([128, 256, 512], 200 * options.repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for width in widths for row in _rows(width, calls)]
    finally:
        torch.set_num_threads(threads)


def _rows(width: int, calls: int) -> list[dict[str, Any]]:
    actor = Actor(OBSERVATIONS, ACTIONS, width, num_blocks=2).requires_grad_(False)
    one = (1.0,) * ACTIONS
    box = AffineMap(one, (0.0,) * ACTIONS, (-1.0,) * ACTIONS, one, already_applied=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    graph = onnx_model(fold(actor), box, {}).SerializeToString()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    row = np.zeros((1, OBSERVATIONS), np.float32)
    works: dict[str, Callable[[], object]] = {
        "onnxruntime": lambda: session.run(["actions"], {INPUT: row}),
        "torch": lambda: torch.tanh(actor(torch.from_numpy(row))[0]).numpy(),
    }
    return [
        {
            "width": width,
            "runtime": name,
            "p50 us": p50,
            "p99 us": p99,
            "p99 below 1 ms": "yes" if p99 < BOUND else "no",
        }
        for name, (p50, p99) in percentiles(works, calls).items()
    ]
