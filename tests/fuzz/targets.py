"""What is tried, by kind: each target takes one damaged input and either takes it or raises UhdError."""

import hashlib
import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.mutations import mutated_bytes, mutated_json

GOLDEN = Path(__file__).parent.parent / "golden"


class Target:
    """A kind of input. `bundle` is one of the embedded model, `scratch` a folder for this case."""

    def __init__(self, bundle):
        self.bundle = bundle

    def try_one(self, random, scratch):
        raise NotImplementedError


class Images(Target):
    def __init__(self, bundle):
        super().__init__(bundle)
        from uhd_export.runtime.image.pattern import pattern

        image = pattern(40, 24)
        exif = Image.Exif()
        exif[0x112], exif[0x11A], exif[0x10F] = 6, 72.0, "maker"
        saved = [
            (image, "PNG", {"exif": exif}), (image, "JPEG", {"exif": exif}),
            (image, "WEBP", {"lossless": True}),
            (image.quantize(16), "GIF", {"save_all": True, "append_images": [image.quantize(8)]}),
            (image, "BMP", {}), (image, "TIFF", {"exif": exif}), (image, "TIFF", {"compression": "tiff_lzw"}),
            (image.convert("RGBA"), "PNG", {}), (image.convert("LA"), "PNG", {}),
            (image.convert("1"), "TIFF", {}),
            (Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60), "PNG", {}),
            (image.convert("CMYK"), "JPEG", {}), (image, "PPM", {}), (image, "TGA", {}), (image, "ICO", {}),
        ]  # fmt: skip
        self._bases = []
        for each, kind, options in saved:
            file = io.BytesIO()
            each.save(file, kind, **options)
            self._bases.append(file.getvalue())

    def try_one(self, random, scratch):
        from uhd_export.runtime.image.source import open_image, source_size

        path = scratch / "image"
        path.write_bytes(mutated_bytes(random.choice(self._bases), random))
        assert open_image(path).mode == "RGB"
        assert len(source_size(str(path))) == 2


def answer(folder):
    """One token about an image."""
    from uhd_export.runtime import Pipeline
    from uhd_export.runtime.image.pattern import pattern

    with Pipeline.open(folder, threads=1, context=1000) as pipeline:
        pipeline.answer(pattern(60, 40), "What?", max_new_tokens=2)


def forge(bundle, scratch, name=None, content=b"", *, sign=True):
    """A copy of `bundle` in which file `name` is `content`, with a manifest that lists it so."""
    folder = scratch / "bundle"
    shutil.copytree(bundle, folder, copy_function=os.link)
    if name is not None:
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        if sign:
            record = json.loads((folder / "manifest.json").read_text())
            record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            write_signed(folder, record)
    return folder


def write_signed(folder, record):
    from uhd_export.runtime.bundle.manifest import _digest

    record["digest"] = _digest(record)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(record))


class Bundles(Target):
    """Bundles that answer as long as nothing is damaged: else every refusal would be for another reason."""

    def __init__(self, bundle):
        super().__init__(bundle)
        answer(bundle)


class BundleFiles(Bundles):
    """Files that are not what the manifest lists."""

    def try_one(self, random, scratch):
        name = random.choice(sorted(path.name for path in self.bundle.iterdir()))
        data = (self.bundle / name).read_bytes()
        damaged = mutated_bytes(data, random)
        answer(forge(self.bundle, scratch, name, damaged, sign=False))
        assert damaged == data, f"{name} was damaged, and answered"


class Manifests(Bundles):
    """Manifests changed and signed anew."""

    def try_one(self, random, scratch):
        folder = forge(self.bundle, scratch)
        text = mutated_json(json.loads((folder / "manifest.json").read_text()), random)
        try:
            record = json.loads(text)
            write_signed(folder, record)
        except (ValueError, TypeError, RecursionError, AttributeError):
            (folder / "manifest.json").unlink()
            (folder / "manifest.json").write_text(text)
        answer(folder)


class Graphs(Bundles):
    """Graphs of another interface, or damaged, in bundles that list them so."""

    def try_one(self, random, scratch):
        import onnx

        name = random.choice(["vision.onnx", "language.onnx"])
        model = onnx.load(self.bundle / name, load_external_data=False)
        for _ in range(random.randint(1, 2)):
            self._change(model.graph, random)
        answer(forge(self.bundle, scratch, name, model.SerializeToString()))

    def _change(self, graph, random):
        values = [*graph.input, *graph.output]
        value, node = random.choice(values), random.choice(graph.node)
        dims = value.type.tensor_type.shape.dim
        kind = random.randrange(9)
        if kind == 0:
            value.name += "_"
        elif kind == 1:
            value.type.tensor_type.elem_type = random.choice([1, 6, 7, 9, 10, 11])
        elif kind == 2 and dims:
            dims[random.randrange(len(dims))].dim_value = random.choice([0, 1, 3, 129, 2**40])
        elif kind == 3 and dims:
            del dims[random.randrange(len(dims))]
        elif kind == 4:
            holder = random.choice([graph.input, graph.output])
            del holder[random.randrange(len(holder))]
        elif kind == 5:
            graph.node.remove(node)
        elif kind == 6 and node.input:
            node.input[random.randrange(len(node.input))] = value.name
        elif kind == 7 and node.attribute:
            del node.attribute[random.randrange(len(node.attribute))]
        else:
            tensor = random.choice(graph.initializer)
            if tensor.dims:
                tensor.dims[random.randrange(len(tensor.dims))] += random.choice([-1, 1, 1000])


RECORD = {
    "record_version": 1,
    "backend": "tensorrt-rtx",
    "tensorrt": "1.7.1.116",
    "compute_capabilities": ["8.6", "8.9"],
    "layers": {"MATRIX_MULTIPLY": 7},
    "plugin_layers": ["vision/jbu_1"],
    "inputs": {
        "pixels": {"dtype": "float32", "shape": ["batch", "3", "height", "width"]},
        "past": {"dtype": "float16", "shape": ["1", "4", "2048", "32"]},
    },
    "outputs": {
        "tokens": {"dtype": "float32", "shape": ["batch", "144", "128"]},
        "present": {"dtype": "float16", "shape": ["1", "4", "2048", "32"]},
    },
    "aliases": {"present": "past"},
    "profiles": [
        {
            "name": "24x24",
            "ranges": {"pixels": {"min": [1, 3, 28, 28], "opt": [6, 3, 336, 336], "max": [10, 3, 672, 672]}},
        }
    ],
    "weight_bytes": 1000,
    "key": "key",
    "bytes": 6,
    "sha256": "5" * 64,
}


class Records(Target):
    """Records beside engine files."""

    def try_one(self, random, scratch):
        from uhd_export.runtime.engines.tensorrt.record import (
            EngineRecord,
            plan_memory,
            read_record,
            write_record,
        )

        engine = scratch / "x.engine"
        engine.write_bytes(b"engine")
        write_record(engine, EngineRecord(**RECORD))
        path = scratch / "x.engine.json"
        path.write_text(mutated_json(json.loads(path.read_text()), random))
        plan_memory(read_record(engine))


class Configs(Target):
    """config.json and the vision tower's."""

    def try_one(self, random, scratch):
        from uhd_export.checkpoint.config import read_config

        config = random.choice(
            sorted(path for path in GOLDEN.glob("configs/*.json") if "clip" not in path.name)
        )
        tower = GOLDEN / "configs" / ("clip_v1q64.json" if "q64" in config.name else "clip.json")
        texts = [json.loads(path.read_text()) for path in (config, tower)]
        damaged = random.randrange(2)
        texts = [mutated_json(t, random) if i == damaged else json.dumps(t) for i, t in enumerate(texts)]
        (scratch / "config.json").write_text(texts[0])
        (scratch / "clip").mkdir()
        (scratch / "clip" / "config.json").write_text(texts[1])
        from uhd_export.checkpoint.options import SourceOptions

        read_config(scratch, SourceOptions(vision_tower=scratch / "clip"))


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


class Tensors(Target):
    """Safetensors files and the index beside them."""

    def _open(self, folder):
        from uhd_export.checkpoint.files import open_files

        for name, file in open_files(folder).items():
            file.shape(name)
            file.tensor(name)

    def _file(self, header, data):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data


class Headers(Tensors):
    def try_one(self, random, scratch):
        if random.random() < 0.7:
            content = self._file(mutated_json(HEADER, random).encode(), bytes(32))
        else:
            content = mutated_bytes(self._file(HEADER, bytes(32)), random)
        (scratch / "model.safetensors").write_bytes(content)
        self._open(scratch)


class Indexes(Tensors):
    def try_one(self, random, scratch):
        name = "model-00001-of-00001.safetensors"
        (scratch / name).write_bytes(self._file(HEADER, bytes(32)))
        index = {"metadata": {"total_size": 32}, "weight_map": {"a": name, "b": name}}
        (scratch / "model.safetensors.index.json").write_text(mutated_json(index, random))
        self._open(scratch)


class Tokenizers(Target):
    def try_one(self, random, scratch):
        from uhd_export.runtime.language.detokenizer import decode
        from uhd_export.runtime.language.prompt import encode_question, load_tokenizer

        path = scratch / "tokenizer.json"
        path.write_text(mutated_json(json.loads((self.bundle / "tokenizer.json").read_text()), random))
        tokenizer = load_tokenizer(path)
        ids = encode_question(tokenizer, "What is <image> </s> 漢?", "vicuna_v1", 1)
        decode(tokenizer, [i for i in ids if i >= 0])


# By kind: the target, and how many cases there are in CI and in a longer run.
KINDS = {
    "images": (Images, 150, 682),
    "bundle files": (BundleFiles, 30, 221),
    "manifests": (Manifests, 50, 440),
    "graphs": (Graphs, 20, 140),
    "records": (Records, 50, 200),
    "configs": (Configs, 60, 337),
    "indexes": (Indexes, 30, 135),
    "headers": (Headers, 50, 135),
    "tokenizers": (Tokenizers, 40, 200),
}
