"""TensorRT and TensorRT for RTX, behind the interface of `uhd_export.runtime.engines.base`."""
