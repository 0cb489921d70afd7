"""The sample images: `python -m uhd_export.nano.samples FOLDER` draws them again."""

import argparse
import json
from pathlib import Path

from uhd_export.nano.cards import make_card_image

SAMPLE_SEED = 3
SAMPLES = 3


def write_samples(folder: Path) -> None:
    """Write cards-1.png, ... (1008x672) and questions.json, answers by image and question."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = {}
    for i in range(SAMPLES):
        image, cards = make_card_image((SAMPLE_SEED, i))
        name = f"cards-{i + 1}.png"
        image.save(folder / name, optimize=True)
        answers[name] = {card.question: card.code for card in cards}
    (folder / "questions.json").write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_samples(parser.parse_args().folder)
