"""The paper's figures, and what each of them measures."""

# LLaVA-UHD v2, Table 4: hours of training, seconds of latency, gigabytes.
PAPER = {"selective": (27.7, 0.54, 39.4), "fix": (26.9, 0.62, 41.7), "pyramid": (62.4, 1.26, 60.3)}
PAPER_NOTE = (
    "The paper's Table 4: period and memory are of fine-tuning on 8 x A100; only the latency is of "
    "inference, of a 1008x672 image on one A100, without its type, software or number of tokens. The "
    "ratios of its FLOPs fit one forward pass, so it is set beside the time to the first token."
)
