"""Slots: the rows of the cache, with what each holds, so that a prompt finds the one that knows it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass
class Slot:
    """One row. `keys` name its positions (see `uhd_export.runtime.language.sequence`)."""

    row: int
    keys: list[Hashable] = field(default_factory=list)
    busy: bool = False
    used: int = 0
    """When it was last taken, as a count."""

    def shared(self, keys: Sequence[Hashable]) -> int:
        """How many positions `keys` begins with are here; the last always runs, since logits are not kept."""
        length = min(len(self.keys), len(keys) - 1)
        return next((i for i in range(length) if self.keys[i] != keys[i]), length)


class Slots:
    """All rows, and which are free."""

    def __init__(self, count: int) -> None:
        self._slots = [Slot(row) for row in range(count)]
        self._taken = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        """How many are free."""
        return sum(not slot.busy for slot in self._slots)

    def take(self, keys: Sequence[Hashable]) -> Slot | None:
        """The free slot that holds most of the prompt `keys`, if that is most of what it holds.

        Else the one not used for longest: a common beginning is no reason to lose another prompt's image.
        """
        free = [slot for slot in self._slots if not slot.busy]
        if not free:
            return None
        shared = {slot.row: slot.shared(keys) for slot in free}
        known = [slot for slot in free if 0 < len(slot.keys) <= 2 * shared[slot.row]]
        if known:
            slot = max(known, key=lambda slot: shared[slot.row])
        else:
            slot = min(free, key=lambda slot: (slot.used, slot.row))
        self._taken += 1
        slot.busy, slot.used = True, self._taken
        return slot
