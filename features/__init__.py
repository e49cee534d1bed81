"""From videos to frame features: decoding, backbones, pooling, PCA, and feature files."""
