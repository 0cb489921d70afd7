"""ONNX graphs of the vision and the language part, weights streamed into them."""
