"""Times by layer, as the engine reports them, in the form of a trace."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any, cast


class LayerTimes:
    """Every layer's time in every run, in order."""

    def __init__(self) -> None:
        self.runs: list[list[tuple[str, float]]] = []
        self._attached: list[Any] = []

    def attach(self, trt: ModuleType, context: Any) -> None:
        """Have `context` report every run from now on; runs become slower by the events in between."""
        runs, base = self.runs, cast(type[Any], trt.IProfiler)

        class Profiler(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)
                self.seen: set[str] = set()

            def report_layer_time(self, layer: str, ms: float) -> None:
                if layer in self.seen or not self.seen:  # a run begins where a layer comes back
                    runs.append([])
                    self.seen.clear()
                self.seen.add(layer)
                runs[-1].append((layer, ms * 1e3))

        profiler = Profiler()
        self._attached.append(profiler)  # contexts do not keep it
        context.profiler = profiler

    def write(self, path: Path) -> Path:
        """Write the trace in the form of ONNX Runtime's (microseconds), and return its path."""
        events, now = [], 0.0
        for run in self.runs:
            whole = sum(duration for _, duration in run)
            events.append({"cat": "Session", "name": "model_run", "ts": now, "dur": whole})
            for layer, duration in run:
                named = {"cat": "Node", "name": f"{layer}_kernel_time", "args": {"op_name": ""}}
                events.append({**named, "ts": now, "dur": duration})
                now += duration
        path.write_text(json.dumps(events), encoding="utf-8")
        return path
