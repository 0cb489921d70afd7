"""Train the embedded model: `python -m uhd_export.nano.train --work FOLDER [--out FOLDER]`.

On a CPU, from nothing, in about an hour on two free cores. Stages, in order:

1. `vision-near`: vision tower and projector read digits, level 1x only (dense loss on 144 windows);
2. `language-few`, `-word`, `-slice`, `-three`: the language model learns the look-up among a few
   windows, then in a slice, then in three slices, all encoded with level 1x, which is cheap;
3. `vision-all`: levels 2x and 4x start from 1x's projection and all three are trained together;
4. `language-all`: whole images of seven crops, encoded with all three levels.

Every stage writes `<stage>.safetensors` to the work folder when it ends and also while it runs; a
finished stage is skipped when the command is repeated, and `--stage NAME` runs one stage alone. Seeds
are fixed; results vary a little with the number of threads. `--out` gets the checkpoint.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from uhd_export.model.language import LanguageModel
from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import VisionTower
from uhd_export.nano import architecture
from uhd_export.nano.cards import NAMES
from uhd_export.nano.token_pool import TokenPool, build_pool, load_pool, save_pool
from uhd_export.nano.tokenizer import build_tokenizer, save_tokenizer, separator_ids
from uhd_export.nano.train_language import Conversations, LanguageStage, train_language
from uhd_export.nano.train_vision import OUTPUTS, VisionStage, train_vision
from uhd_export.runtime.files import replacing

ALL = (1, 2, 4)
VISION = {
    "vision-near": VisionStage(levels=(1,), steps=700, batch=4, rate=1.5e-3, overview_every=0),
    "vision-all": VisionStage(levels=ALL, steps=200, batch=6, rate=4e-4, overview_every=6),
}


@dataclass(frozen=True)
class PoolStage:
    """How many slices and whole images are encoded, at which levels, by which stage's vision part."""

    vision: str
    levels: tuple[int, ...]
    slices: int
    images: int


POOLS = {
    "pool-near": PoolStage("vision-near", levels=(1,), slices=1500, images=30),
    "pool-all": PoolStage("vision-all", levels=ALL, slices=500, images=100),
}
FEW = LanguageStage(slices=0, windows=10, steps=500, batch=16, rate=2e-3, final_rate=1e-3, word_weight=0.0)
LANGUAGE = {
    # Among few windows first: evenly spread over 144 the attention gets almost no gradient.
    "language-few": FEW,
    # Copying the code that begins with the digit just said comes first; the auxiliary loss on the
    # colour's name makes the look-up by colour form too.
    "language-word": replace(FEW, questions=2, word_weight=1.0),
    "language-slice": LanguageStage(slices=0, steps=200, batch=8, rate=1.5e-3, final_rate=7.5e-4),
    "language-three": LanguageStage(slices=3, steps=150, batch=6, rate=1e-3, final_rate=5e-4),
    "language-all": LanguageStage(slices=6, steps=500, batch=4, rate=8e-4, final_rate=8e-5),
}
# The tokens that a stage learns from, where they are not those of level 1x.
POOL_OF = {"language-all": "pool-all"}
# Stages that go on from another's result.
PARENT = {
    "vision-all": "vision-near",
    "language-word": "language-few",
    "language-slice": "language-word",
    "language-three": "language-slice",
    "language-all": "language-three",
}
STAGES = (
    "vision-near",
    "pool-near",
    "language-few",
    "language-word",
    "language-slice",
    "language-three",
    "vision-all",
    "pool-all",
    "language-all",
)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory; returning it costs more than half of a training step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc: only slower
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, value)


class Trainer:
    """The modules, and the stages that change them, in a work folder."""

    def __init__(self, work: Path, log: Callable[[str], None]) -> None:
        self.work, self.log = work, log
        self.tokenizer = build_tokenizer()
        separators, vocab = separator_ids(self.tokenizer), self.tokenizer.get_vocab_size()
        self.raw = architecture.raw_config(vocab, separators)
        self.config = architecture.typed_config(vocab, separators)
        torch.manual_seed(0)
        self.tower, self.projector = architecture.fresh_vision(self.config)
        self.head = nn.Linear(self.config.language.hidden, OUTPUTS)
        self.language = architecture.fresh_language(self.config)

    def path(self, stage: str) -> Path:
        """A stage's result."""
        return self.work / f"{stage}.safetensors"

    def run(self, stage: str) -> None:
        """Run `stage` unless its result exists."""
        if self.path(stage).exists():
            self.log(f"{stage}: already done")
            return
        start = time.monotonic()
        if stage in VISION:
            self._vision(stage)
        elif stage in POOLS:
            self._pool(stage)
        else:
            self._language(stage)
        self.log(f"{stage}: done in {time.monotonic() - start:.0f} s")

    def _vision(self, stage: str) -> None:
        if stage in PARENT:
            self.load(PARENT[stage])
            self._start_levels_from_first()
        parts: dict[str, nn.Module] = {"tower": self.tower, "projector": self.projector, "head": self.head}
        train_vision(
            self.tower,
            self.projector,
            self.head,
            VISION[stage],
            seed=STAGES.index(stage),
            log=self.log,
            save=lambda: self._save(stage + ".partial", parts),
        )
        self._save(stage, parts)

    def _start_levels_from_first(self) -> None:
        """Levels 2x and 4x begin as 1x; their embeddings stay their own."""
        first = self.projector.get_submodule("features_1x_projector").state_dict()
        for scale in ALL[1:]:
            self.projector.get_submodule(f"features_{scale}x_projector").load_state_dict(first)

    def _pool(self, stage: str) -> None:
        sizes = POOLS[stage]
        self.load(sizes.vision)
        pool = build_pool(
            self.tower,
            self.projector,
            levels=sizes.levels,
            slices=sizes.slices,
            images=sizes.images,
            seed=STAGES.index(stage),
            log=self.log,
        )
        save_pool(pool, self.path(stage))

    def _language(self, stage: str) -> None:
        pool: TokenPool = load_pool(self.path(POOL_OF.get(stage, "pool-near")))
        if stage in PARENT:
            self.load(PARENT[stage])
        else:
            self.load("vision-near")
            self._start_colour_words()
        parts: dict[str, nn.Module] = {"language": self.language}
        train_language(
            self.language,
            Conversations(self.tokenizer, self.config.separators),
            pool,
            LANGUAGE[stage],
            seed=STAGES.index(stage),
            log=self.log,
            save=lambda: self._save(stage + ".partial", parts),
        )
        self._save(stage, parts)

    @torch.no_grad()
    def _start_colour_words(self) -> None:
        """The embedding of a colour's name begins at the direction in which tokens show that colour.

        The dense head has found it; matching words to windows is then learned much sooner.
        """
        table = self.language.model.embed_tokens.weight
        for row, name in zip(self.head.weight[1:], NAMES, strict=False):
            (token,) = self.tokenizer.encode(f" {name}", add_special_tokens=False).ids
            table[token] = row / row.square().mean().sqrt()

    def _save(self, stage: str, parts: dict[str, nn.Module]) -> None:
        tensors = {f"{name}.{key}": t for name, m in parts.items() for key, t in m.state_dict().items()}
        with replacing(self.path(stage)) as partial:
            save_file({key: t.contiguous() for key, t in tensors.items()}, partial)

    def load(self, stage: str) -> None:
        """Load the modules that a stage's result holds."""
        if not self.path(stage).exists():
            sys.exit(f"{self.path(stage)}: missing; run stage {stage} first")
        state = load_file(self.path(stage))
        modules: dict[str, nn.Module] = {
            "tower": self.tower,
            "projector": self.projector,
            "head": self.head,
            "language": self.language,
        }
        for name, module in modules.items():
            part = {k.removeprefix(name + "."): t for k, t in state.items() if k.startswith(name + ".")}
            if part:
                module.load_state_dict(part)

    def write(self, out: Path, vision: str, language: str) -> None:
        """Write the checkpoint made of two stages' results."""
        self.load(vision)
        self.load(language)
        modules: tuple[VisionTower, HiwinProjector, LanguageModel]
        modules = self.tower, self.projector, self.language
        architecture.save_checkpoint(out, self.raw, *modules)
        save_tokenizer(self.tokenizer, out / "tokenizer.json")
        self.log(f"wrote {out}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for stage results")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run only this stage (repeatable)")
    parser.add_argument("--vision", default="vision-all", help="stage whose vision part --out takes")
    parser.add_argument("--language", default="language-all", help="stage whose language part --out takes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.work, lambda text: print(text, flush=True))
    for stage in options.stage if options.stage is not None else STAGES:
        trainer.run(stage)
    if options.out is not None:
        trainer.write(options.out, options.vision, options.language)


if __name__ == "__main__":
    main()
