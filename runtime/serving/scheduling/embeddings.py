"""A prompt as the language engine reads it: embeddings of texts and images, from where it has to run."""

from uhd_export.runtime.engines.base import Array, Engine
from uhd_export.runtime.language.decoder import EMBEDS
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.sequence import PlannedImage, place
from uhd_export.runtime.serving.images.cutting import CutImage
from uhd_export.runtime.serving.images.encoded import EncodedImages
from uhd_export.runtime.serving.scheduling.generation import Generation


class PromptEmbeddings:
    """Embeddings of prompts whose images were encoded; what they give is kept in `encoded`."""

    def __init__(self, language: Engine, table: EmbeddingTable, encoded: EncodedImages) -> None:
        self._language, self._table, self._encoded = language, table, encoded

    def of(self, generation: Generation, start: int) -> Array:
        """(S, D) embeddings of the prompt from position `start` on."""
        images = {image.planned.digest: image for image in generation.request.images}
        pieces = []
        for segment in generation.request.sequence.segments:
            if segment.stop > start:
                content = segment.content
                rows = (
                    self._image_rows(images[content.digest], generation)
                    if isinstance(content, PlannedImage)
                    else self._table.rows(content)
                )
                pieces.append(rows[max(start - segment.start, 0) :])
        return self._language.gather(pieces, self._language.inputs[EMBEDS].dtype)

    def _image_rows(self, image: CutImage, generation: Generation) -> Array:
        """(positions, D) embeddings of an image; kept for who comes next."""
        if image.rows is not None:
            return image.rows
        planned, encoding = image.planned, generation.encodings[image.planned.digest]
        known = self._encoded.get(planned.digest)
        if known is not None:
            return known
        if encoding.error is not None:
            raise encoding.error
        crops = [encoding.tokens[index] for index in range(len(image.crops))]
        separators = self._table.rows(planned.tokens[planned.source < 0])
        pieces = place(planned.source, crops, separators)
        rows = self._language.gather(pieces, self._language.inputs[EMBEDS].dtype)
        self._encoded.put(planned.digest, rows)
        return rows
