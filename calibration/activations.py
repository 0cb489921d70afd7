"""Sequences of hidden states laid end to end, in batches with masks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Activations:
    """The rows (T, D) of several sequences, `lengths` positions each, one after another."""

    rows: torch.Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.rows.shape[0] != sum(self.lengths):
            raise ValueError(f"{self.rows.shape[0]} rows for sequences of {sum(self.lengths)} positions")

    @staticmethod
    def join(sequences: list[torch.Tensor]) -> "Activations":
        """From a list of (S, D) sequences."""
        return Activations(torch.cat(sequences), tuple(len(sequence) for sequence in sequences))

    def clone(self) -> "Activations":
        """A copy that can be changed on its own."""
        return Activations(self.rows.clone(), self.lengths)

    def batches(self, size: int) -> Iterator["Batch"]:
        """Batches of up to `size` neighbouring sequences, padded on the right."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        for first in range(0, len(self.lengths), size):
            lengths = self.lengths[first : first + size]
            rows = self.rows[starts[first] : starts[first + len(lengths)]]
            yield Batch(rows, lengths)

    def last_rows(self, counts: tuple[int, ...]) -> torch.Tensor:
        """The last `counts[i]` rows of each sequence i."""
        parts = zip(self.rows.split(self.lengths), counts, strict=True)
        return torch.cat([rows[len(rows) - count :] for rows, count in parts])


@dataclass
class Batch:
    """Neighbouring sequences; `rows` is a view of the activations they belong to."""

    rows: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def mask(self) -> torch.Tensor:
        """(B, S) bool, true at real positions; the others are padding, which nothing may look at."""
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    @property
    def padded(self) -> torch.Tensor:
        """(B, S, D) with zeros at padding. Causal attention keeps it from real positions before it."""
        out = self.rows.new_zeros(len(self.lengths), max(self.lengths), self.rows.shape[1])
        out[self.mask] = self.rows
        return out

    def real(self, padded: torch.Tensor) -> torch.Tensor:
        """The rows (sum of lengths, ...) of (B, S, ...) that are not padding."""
        return padded[self.mask]

    def replace(self, padded: torch.Tensor) -> None:
        """Overwrite the rows, in the activations too, with those of (B, S, D)."""
        self.rows.copy_(self.real(padded))
