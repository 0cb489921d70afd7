"""Group-quantized weights as GPTQ checkpoints store them."""
