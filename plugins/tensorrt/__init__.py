"""The operators as TensorRT plugins: built into engines, launched through the driver."""
