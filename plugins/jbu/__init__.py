"""Joint bilateral upsampling: one stage doubles a feature map, guided by the image."""
