"""The last encoded images: their embeddings, so that a further question encodes nothing again."""

from collections import OrderedDict
from collections.abc import Sequence

from uhd_export.runtime.engines.base import Array, Engine, Stop
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.language.decoder import EMBEDS
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.sequence import PlannedImage, place
from uhd_export.runtime.stopwatch import Stopwatch

CAPACITY = 4


class EncodedImages:
    """Embeddings of images by digest; beyond `capacity` the one that was not used for longest is dropped.

    They lie where the language engine reads them, which may be its device.
    """

    def __init__(
        self, encoder: VisionEncoder, language: Engine, table: EmbeddingTable, *, capacity: int = CAPACITY
    ) -> None:
        self._encoder, self._language, self._table = encoder, language, table
        self._capacity = capacity
        self._rows: OrderedDict[str, Array] = OrderedDict()

    def __contains__(self, planned: PlannedImage) -> bool:
        return planned.digest in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, planned: PlannedImage, watch: Stopwatch, stop: Stop | None = None) -> Array:
        """(positions, D) embeddings of an image, encoded unless they are here."""
        if planned in self:
            self._rows.move_to_end(planned.digest)
            return self._rows[planned.digest]
        with watch.stage("image"):
            crops = cut(planned.image, planned.plan)
        tokens = self._encoder.encode_resident(crops, planned.grid_mode, watch, stop)
        with watch.stage("vision"):
            return self.add(planned, tokens)

    def add(self, planned: PlannedImage, crops: Sequence[Array]) -> Array:
        """(positions, D) embeddings of an image from its crops' tokens, separators in place."""
        separators = self._table.rows(planned.tokens[planned.source < 0])
        pieces = place(planned.source, crops, separators)
        rows = self._language.gather(pieces, self._language.inputs[EMBEDS].dtype)
        self._rows[planned.digest] = rows
        self._rows.move_to_end(planned.digest)
        if len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return rows

    def clear(self) -> None:
        """Drop all of them."""
        self._rows.clear()
