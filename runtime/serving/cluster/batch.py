"""Ray Data: a file of questions over many devices, each with a service of its own."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from uhd_export.runtime.serving.batch.file import BatchOptions, Line, Results, answer_lines
from uhd_export.runtime.serving.cluster.connection import connect
from uhd_export.runtime.serving.service import Service


@dataclass(frozen=True)
class WorkerOptions:
    """`count` devices, each with `slots` answers at a time, `gpus` and `cpus`."""

    count: int
    slots: int
    gpus: float = 0
    cpus: float = 1


def cluster_results(
    open_service: Callable[[], Service], questions: Path, options: BatchOptions, workers: WorkerOptions
) -> Results:
    """Answers from the cluster that Ray is connected to, else from this machine.

    The images lie under the same path on every machine.
    """

    def results(lines: Sequence[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
        if not lines:
            return
        connect(workers.count, cpus=workers.cpus, gpus=workers.gpus)
        ray.data.DataContext.get_current().enable_progress_bars = False
        known = {line.number: line for line in lines}
        block = 4 * workers.slots
        data = ray.data.from_items(
            [asdict(line) for line in lines], override_num_blocks=-(-len(lines) // block)
        )
        answered = data.map_batches(
            Answerer,
            fn_constructor_args=(open_service, questions, options),
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            num_gpus=workers.gpus or None,
            num_cpus=None if workers.gpus else workers.cpus,
        )
        for row in answered.iter_rows():
            yield known[int(row["number"])], json.loads(row["told"])

    return results


class Answerer:
    """One device: Ray makes it once, and gives it blocks of lines."""

    def __init__(self, open_service: Callable[[], Service], questions: Path, options: BatchOptions) -> None:
        self._service, self._questions, self._options = open_service(), questions, options

    def __call__(self, block: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """`number` and `told`, what is written of it as JSON, of each line."""
        rows = zip(block["number"], block["where"], block["text"], strict=True)
        lines = [Line(int(number), str(where), str(text)) for number, where, text in rows]
        done = list(answer_lines(self._service, lines, self._questions, self._options))
        return {
            "number": np.array([line.number for line, _ in done]),
            "told": np.array([json.dumps(told) for _, told in done]),
        }
