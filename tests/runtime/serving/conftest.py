"""Services on the embedded model and on the golden one."""

import pytest
from PIL import Image

from uhd_export.nano.cards import HELD_OUT_SEED, make_card_image
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.service import Service, ServiceOptions


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory):
    """The embedded model's bundle, not to be changed."""
    from uhd_export.bundle.build import build_bundle

    folder = tmp_path_factory.mktemp("bundles") / "nano"
    build_bundle("nano", folder, verify=False)
    return folder


@pytest.fixture(scope="session")
def cards() -> list[tuple[Image.Image, str, str]]:
    """Held-out images, a question about each, and the code on the card; the last is too small to read."""
    pairs = []
    for index in range(3):
        image, drawn = make_card_image((HELD_OUT_SEED, index))
        if index == 2:
            image = image.resize((image.width // 2, image.height // 2))
        pairs.append((image, drawn[0].question, drawn[0].code))
    return pairs


@pytest.fixture
def serve(nano_bundle):
    """`serve(**options)` opens the embedded model; whatever was opened is closed."""
    opened = []

    def run(bundle=nano_bundle, **options):
        service = Service.open(bundle, ServiceOptions(**{"context": 2048, **options}), threads=1)
        opened.append(service)
        return service

    yield run
    for service in opened:
        service.close()


@pytest.fixture
def ask():
    """`ask(service, image, question, ...)`: the stream of an answer."""

    def run(service, image, question, **options):
        images = image if isinstance(image, list) else [image] if image is not None else []
        texts = ("<image>\n" * len(images) + question).split("<image>")
        return service.submit(service.prepare([Message("user", tuple(texts))], images, **options))

    return run
