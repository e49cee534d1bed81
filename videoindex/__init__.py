"""Search your own videos, as a library: `videoindex.index.VideoIndex`."""
