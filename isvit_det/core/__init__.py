"""The method itself: quantizers, layers and units; needs torch alone."""
