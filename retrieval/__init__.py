"""From frame features to rankings: encode, compare, metrics of similarity, alignment, reports."""
