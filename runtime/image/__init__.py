"""From an image to the vision engine's tokens: slices, pixels, geometry, token layout."""
