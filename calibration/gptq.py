"""GPTQ of a language model, layer by layer, on sequences of embeddings.

Each layer is loaded alone. Its groups of linears are quantized one after another, each on the inputs that
the quantized linears before it produce; the layer that the next one builds on multiplies exactly what is
stored. Held-out sequences run beside: through the unquantized layers, through those rounded to the nearest,
and through GPTQ's.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from uhd_export.calibration.activations import Activations
from uhd_export.calibration.layers import GROUPS, LayerRunner, linear, load_layer
from uhd_export.calibration.options import GptqOptions
from uhd_export.calibration.quality import LinearQuality, ModelQuality, model_quality, output_error
from uhd_export.calibration.sequences import Progress, Sequences
from uhd_export.calibration.solver import GroupSolver, Solved
from uhd_export.calibration.work import Work
from uhd_export.checkpoint.int4.linears import head_group
from uhd_export.checkpoint.int4.weight import QuantizedWeight, round_to_nearest
from uhd_export.checkpoint.int4.words import pack_gptq
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.model.language import DecoderLayer, RMSNorm
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError

CALIBRATION, HELD_OUT, WITH_RTN, WITH_GPTQ = "calibration", "held_out", "held_out_rtn", "held_out_gptq"
# Held-out input rows on which layer errors are measured, of all sequences together.
ERROR_ROWS = 2048


def better(
    solved: Solved, dense: torch.Tensor, inputs: torch.Tensor, rtn_error: float, options: GptqOptions
) -> tuple[Solved, float]:
    """`solved`, or `dense` (N, K) rounded to the nearest where that has the smaller error; and that error.

    Errors are measured on `inputs` (T, K), held-out ones, of which rounding's is `rtn_error`. The library's
    scales clip groups without negative weights, and it then loses to rounding by 2 to 4 times.
    """
    error = output_error(inputs, dense, torch.from_numpy(solved.weight.dequantize()))
    if solved.fallback is not None or not error > rtn_error:
        return solved, error
    reason = f"rounding to the nearest measured better, {rtn_error:.2e} against {error:.2e}"
    rounded = round_to_nearest(dense.numpy(), options.group_size, symmetric=options.symmetric)
    return Solved(rounded, solved.samples, reason), rtn_error


@dataclass
class Run:
    """A quantization under way: `states` are the hidden states before layer `next_layer`."""

    checkpoint: Checkpoint
    config: LanguageConfig
    options: GptqOptions
    work: Work
    states: dict[str, Activations]
    judged: tuple[int, ...]
    batch: int = 1
    next_layer: int = 0

    @staticmethod
    def states_of(sequences: Sequences) -> dict[str, Activations]:
        """The hidden states before the first layer."""
        held = sequences.held_out
        return {
            CALIBRATION: sequences.calibration,
            HELD_OUT: held,
            WITH_RTN: held.clone(),
            WITH_GPTQ: held.clone(),
        }

    @torch.inference_mode()
    def quantize_layers(self, progress: Progress) -> None:
        """Quantize the layers that remain; `progress(done, total)` counts groups of linears of all layers."""
        longest = max(max(activations.lengths) for activations in self.states.values())
        runner = LayerRunner(self.config, longest, self.batch)
        for index in range(self.next_layer, self.config.layers):
            activations, rtn_errors = self._rounded(runner, index)
            layer = load_layer(self.checkpoint, self.config, index)
            tensors: dict[str, np.ndarray] = {}
            records: list[LinearQuality] = []
            done: dict[str, QuantizedWeight] = {}
            for number, group in enumerate(GROUPS, start=1):
                dense = {name: linear(layer, name).weight for name in group}
                for name, solved in self._solve(runner, layer, group, done).items():
                    held_out = activations[group[0]]
                    best, error = better(solved, dense[name], held_out, rtn_errors[name], self.options)
                    linear(layer, name).weight.data = torch.from_numpy(best.weight.dequantize())
                    done[name] = best.weight
                    records.append(self._record(index, name, best, rtn_errors[name], error))
                    parts = pack_gptq(best.weight)
                    tensors |= {f"model.layers.{index}.{name}.{part}": a for part, a in parts.items()}
                del dense, activations[group[0]]
                progress(index * len(GROUPS) + number, len(GROUPS) * self.config.layers)
            for state in (CALIBRATION, WITH_GPTQ):
                runner.advance(layer, self.states[state])
            del layer
            self.work.save_layer(index, tensors, records)
            self.next_layer = index + 1
            self.work.save_activations(self.next_layer, self.states, self.judged)

    def _rounded(self, runner: LayerRunner, index: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Held-out inputs of each group in the unquantized layer, and the errors of rounding its linears."""
        layer = load_layer(self.checkpoint, self.config, index)
        captured: dict[str, list[torch.Tensor]] = {group[0]: [] for group in GROUPS}
        held = self.states[HELD_OUT]
        step = max(1, -(-sum(held.lengths) // ERROR_ROWS))
        runner.advance(layer, held, lambda name, rows: captured[name].append(rows[::step].clone()))
        activations = {name: torch.cat(parts) for name, parts in captured.items()}
        errors = {}
        for group in GROUPS:
            for name in group:
                dense = linear(layer, name).weight
                rounded = round_to_nearest(
                    dense.numpy(), self.options.group_size, symmetric=self.options.symmetric
                )
                values = torch.from_numpy(rounded.dequantize())
                errors[name] = output_error(activations[group[0]], dense, values)
                dense.data = values
        runner.advance(layer, self.states[WITH_RTN])
        return activations, errors

    def _solve(
        self,
        runner: LayerRunner,
        layer: DecoderLayer,
        group: tuple[str, ...],
        done: dict[str, QuantizedWeight],
    ) -> dict[str, Solved]:
        calibration = self.states[CALIBRATION]
        linears = {name: linear(layer, name) for name in group}
        solver = GroupSolver(linears, self.options, sum(calibration.lengths))
        for rows in runner.inputs(layer, calibration, group[0]):
            solver.add(rows)
        # Solving takes the most memory, so the linears that are done wait as integers, a quarter of their
        # size. The last group has the largest Hessian, and by then that is the rest of the layer.
        for name in done:
            linear(layer, name).weight.data = torch.empty(0)
        solved = solver.solve()
        for name, weight in done.items():
            linear(layer, name).weight.data = torch.from_numpy(weight.dequantize())
        return solved

    def _record(self, index: int, name: str, solved: Solved, rtn: float, gptq: float) -> LinearQuality:
        if not (math.isfinite(rtn) and math.isfinite(gptq)):
            raise UhdError(
                f"model.layers.{index}.{name}: outputs are not finite; are the checkpoint's weights whole?"
            )
        outputs, inputs = solved.weight.codes.shape
        return LinearQuality(index, name, outputs, inputs, solved.samples, solved.fallback, rtn, gptq)

    def records(self) -> tuple[LinearQuality, ...]:
        """What was measured on all layers."""
        return tuple(record for index in range(self.next_layer) for record in self.work.layer_quality(index))

    @torch.inference_mode()
    def model_qualities(self) -> tuple[ModelQuality, ModelQuality, ModelQuality | None]:
        """The whole model against the unquantized one: layers rounded, by GPTQ, and these with an int8 head.

        Bundles have such a head; None where no group size divides it.
        """
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden, self.config.eps)
        self.checkpoint.load_into(norm, "model.norm.", torch.float32)
        head = self.checkpoint.tensor(self.checkpoint.head(self.config.tied), torch.float32)
        before, with_rtn, with_gptq = (
            norm(self.states[state].last_rows(self.judged)) for state in (HELD_OUT, WITH_RTN, WITH_GPTQ)
        )
        expected = F.linear(before, head)
        rtn, gptq = (model_quality(expected, F.linear(x, head)) for x in (with_rtn, with_gptq))
        group = head_group(self.config)
        if self.config.hidden % group:
            return rtn, gptq, None
        rounded = torch.from_numpy(round_to_nearest(head.numpy(), group, bits=8).dequantize())
        return rtn, gptq, model_quality(expected, F.linear(with_gptq, rounded))
