"""Fixtures shared by the tests: the golden checkpoint, its models and tensors."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels run under Triton's interpreter, which must be chosen before any of them is imported; what
# compiles them does it in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

import functools
import signal
from pathlib import Path

import pytest
from golden import recipe
from hypothesis import settings

# Examples run on shared machines: how long one takes says nothing about correctness.
settings.register_profile("uhd", deadline=None)
settings.load_profile("uhd")

# Jobs in the background of a shell start with SIGINT ignored, and so would the processes of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory) -> Path:
    """A folder with the golden checkpoint; its CLIP's config is in the subfolder `clip`."""
    return recipe.write_checkpoint(tmp_path_factory.mktemp("golden") / "checkpoint")


@pytest.fixture(scope="session")
def golden_model(golden_checkpoint):
    """`golden_model(**options)`: the golden checkpoint as a model, loaded once for each set of options."""
    from uhd_export import load_model

    @functools.cache
    def load(**options):
        return load_model(golden_checkpoint, vision_tower=golden_checkpoint / "clip", **options)

    return load


@pytest.fixture(scope="session")
def spoken_checkpoint(golden_checkpoint) -> Path:
    """The golden checkpoint with a tokenizer: ids 3 to 258 are bytes, 259 a space, all others words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += [f"▁w{i}" for i in range(len(names), 32000)]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(golden_checkpoint / "tokenizer.json"))
    return golden_checkpoint


@pytest.fixture(scope="session")
def golden_bundle(spoken_checkpoint, tmp_path_factory) -> Path:
    """A float32 bundle of the golden checkpoint, not to be changed."""
    from support.options import build_options

    from uhd_export import build_bundle

    folder = tmp_path_factory.mktemp("bundles") / "golden"
    options = build_options(vision_tower=spoken_checkpoint / "clip")
    build_bundle(spoken_checkpoint, folder, options=options, verify=False)
    return folder


@pytest.fixture
def call():
    """`call(*arguments)` runs the command line in this process."""
    from click.testing import CliRunner

    from uhd_export.cli import main as cli

    def run(*arguments, **options):
        return CliRunner().invoke(cli.main, [str(a) for a in arguments], **options)

    return run


@pytest.fixture
def fails(call):
    """`fails(*arguments)` is the one line of an error with exit code 2; anything else fails the test."""

    def run(*arguments, **options):
        done = call(*arguments, **options)
        lines = done.stderr.splitlines()
        assert done.exit_code == 2, done.output
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert done.stdout == ""
        return lines[0]

    return run


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    """A readable image of 300x200 pixels."""
    from uhd_export.runtime.image.pattern import pattern

    path = tmp_path_factory.mktemp("images") / "image.png"
    pattern(300, 200).save(path)
    return path
