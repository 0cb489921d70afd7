"""The vision part in 8 bits: what is rounded, by measured error, after an exact smoothing."""
