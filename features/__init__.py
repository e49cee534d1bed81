"""From videos to frame features: decoding, backbones, pooling, PCA, and the files that hold them."""
