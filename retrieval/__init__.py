"""From descriptors to rankings: encode, compare, measures of similarity, reports."""
