"""What a user may choose about how the vision part's weights are stored."""

VISION_WEIGHTS = ("dense", "int8")
