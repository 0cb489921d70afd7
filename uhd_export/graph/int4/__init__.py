"""How ONNX Runtime and TensorRT store 4-bit weights, and which form a build takes."""
