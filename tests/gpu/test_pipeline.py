"""A whole bundle on the CUDA provider: what computes wrong numbers is refused when it is opened."""

import pytest

from uhd_export.runtime import Pipeline
from uhd_export.runtime.errors import UhdError


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """`bundles(dtype)`: nano, with the logits it gave where it was built."""
    from uhd_export.bundle.build import build_bundle
    from uhd_export.bundle.options import BuildOptions

    folder = tmp_path_factory.mktemp("bundles")

    def build(dtype):
        if not (folder / dtype).exists():
            build_bundle("nano", folder / dtype, options=BuildOptions(dtype=dtype))
        return folder / dtype

    return build


def test_the_float32_bundle_is_refused_with_the_remedy(bundles):
    with pytest.raises(
        UhdError, match=r"^device cuda: .*in float32 there; build the bundle with --dtype float16"
    ):
        Pipeline.open(bundles("float32"), device="cuda")


def test_a_device_with_wrong_numbers_is_refused_when_it_is_opened(bundles, cuda, monkeypatch, tmp_path):
    """The fake one computes nothing. The cache is taken for updated, so that nothing but numbers can tell."""
    from uhd_export.runtime.engines.onnxruntime import OrtBinding

    monkeypatch.setattr(OrtBinding, "_check_update", lambda self: None)
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path))
    with pytest.raises(
        UhdError, match=r"^device cuda \(ONNX Runtime .*, a device that computes nothing.*differ"
    ):
        Pipeline.open(bundles("float16"), device="cuda")
