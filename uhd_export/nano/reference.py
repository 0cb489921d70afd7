"""Answers of the PyTorch model, for `evaluate`: `python -m uhd_export.nano.reference [FOLDER]`."""

import argparse
import time
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer

from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.model.uhd import UhdModel, load_model
from uhd_export.nano.evaluate import Answer, evaluate
from uhd_export.runtime.image.slicing import MAX_SLICES
from uhd_export.runtime.language.prompt import render

LONGEST_ANSWER = 8


def model_answer(model: UhdModel) -> Answer:
    """A function (image, question) -> text that asks `model`, greedily."""
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))

    def answer(image: Image.Image, question: str) -> str:
        prompt = render(question, model.config.template)
        return tokenizer.decode(model.generate_ids(image, prompt, LONGEST_ANSWER), skip_special_tokens=True)

    return answer


def main() -> None:
    """Evaluate a checkpoint in PyTorch, with slices and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--max-slices", type=int, nargs="*", default=[MAX_SLICES, 1])
    options = parser.parse_args()
    for slices in options.max_slices:
        start = time.monotonic()
        result = evaluate(model_answer(load_model(options.folder, max_slices=slices)), options.count)
        for miss in result.misses[:5]:
            print(f"  image {miss.index}: {miss.question} {miss.expected}, not {miss.got!r}")
        spent = time.monotonic() - start
        print(f"max slices {slices}: {result.exact} of {result.total} exact, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
