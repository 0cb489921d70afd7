"""Bodies of chat requests."""

import base64
import io

from PIL import Image


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    """The image in a data URI."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def about(image: Image.Image, question: str) -> list[dict]:
    """Messages that ask about an image."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_uri(image)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": parts}]
