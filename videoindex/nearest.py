"""The nearest videos of an index, by FAISS over its window descriptors."""

import hashlib

import faiss
import numpy as np

from files import DeferredFile, atomic
from utils import InputError
from videoindex.store import IndexStore, database_errors

BLOCK = 65536  # rows handled at a time
TRAINING_ROWS = 4 * BLOCK  # about how many descriptors an index is trained on
MAX_NEIGHBOURS = 100  # of a window, if FAISS has no range search for the kind of index


class NearestVideos:
    """The window descriptors of a store in a FAISS index, by inner product.

    A Flat index is filled when it is opened. Other types are trained once, and stored in the
    folder by `save`; what was added to the store since then is added when they are opened.

    Args:
        index_type: a FAISS factory string.
        earlier: one of the same store, whose training is used again.

    Attributes:
        state: the store's `window_state` when it was read.
    """

    def __init__(
        self,
        store: IndexStore,
        index_type: str = "Flat",
        earlier: "NearestVideos | None" = None,
    ):
        self.store, self.index_type = store, index_type
        self.state = store.window_state()
        self.generation, self.owners, self.descriptors = store.window_table()
        tag = hashlib.sha256(index_type.encode()).hexdigest()[:8]
        self.path = store.folder / f"ann-{self.generation}-{tag}.faiss"

        trained = earlier and earlier.generation == self.generation
        if trained and earlier.index_type == index_type:  # descriptors may have been added
            self.index = faiss.clone_index(earlier.index)
        else:
            self.index = self._read() or trained_index(index_type, self.descriptors)
        for start in range(self.index.ntotal, len(self.descriptors), BLOCK):
            self.index.add(np.asarray(self.descriptors[start : start + BLOCK]))

    def _read(self):
        """The index that `save` wrote, or None."""
        if self.index_type == "Flat" or not self.path.exists():
            return None
        try:
            return set_search_effort(faiss.read_index(str(self.path)))
        except RuntimeError:  # damaged: it is trained again
            return None

    def save(self) -> None:
        """Store a trained index in the folder; a Flat one takes no training."""
        if self.index_type != "Flat" and self.index.ntotal:
            with (
                database_errors(self.store.folder),
                atomic(self.path) as temporary,
                DeferredFile(temporary) as file,
            ):
                faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))
                file.check()

    def search(self, windows: np.ndarray, count: int) -> list[tuple[int, float]]:
        """The `count` nearest videos of one video: [(content, similarity)], best first.

        The similarity of two videos is that of their most similar windows. Ties are in the order
        in which the videos were added.

        Args:
            windows: (P, D) float32, the video's window descriptors.
        """
        best: dict[int, float] = {}
        total = self.index.ntotal
        k = count  # neighbours of each window
        while total:
            k = min(k, total)
            similarities, rows = self.index.search(windows, k)  # (P, k) each
            best = self._best_by_video(similarities.ravel(), rows.ravel())
            # A window that was not returned is at most as similar as the last one that was. So the
            # answer is complete if `count` videos are at least that similar.
            lowest = np.sort(list(best.values()))[-count:]
            complete = len(lowest) == count and lowest[0] >= similarities[:, -1].max()
            if complete or k == total:
                break
            k *= 2  # holes, or several windows of one video, took up places
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
        return ranked[:count]

    def _best_by_video(self, similarities, rows):
        """{content: its highest similarity} of the rows that FAISS returned, holes left out."""
        returned = rows >= 0  # FAISS fills up with -1
        owners = self.owners[rows[returned]].tolist()
        best = {}
        for owner, similarity in zip(owners, similarities[returned].tolist(), strict=True):
            if owner >= 0 and similarity > best.get(owner, -2.0):
                best[owner] = similarity
        return best

    def centres(self, radius: float) -> "CentreIndex":
        """An empty CentreIndex over these descriptors."""
        return CentreIndex(self, radius)


class CentreIndex:
    """Some contents of a NearestVideos, to which more are added: those near another are found.

    A content is near if two windows have at least the similarity `radius`. If FAISS has no range
    search for the kind of index, only the nearest MAX_NEIGHBOURS of each window are considered.
    """

    def __init__(self, nearest: NearestVideos, radius: float):
        self.descriptors, self.radius = nearest.descriptors, radius
        if nearest.index_type == "Flat":
            self.index = faiss.IndexFlatIP(nearest.index.d)
        else:  # trained already
            self.index = faiss.clone_index(nearest.index)
            self.index.reset()
        order = np.argsort(nearest.owners, kind="stable")
        owners, starts = np.unique(nearest.owners[order], return_index=True)
        # {content: rows of its descriptors}
        parts = np.split(order, starts[1:])[: len(owners)]
        self.rows = dict(zip(owners.tolist(), parts, strict=True))
        self.owners: list[int] = []  # of the windows that were added

    def add(self, number: int) -> None:
        rows = self.rows[number]
        self.index.add(np.ascontiguousarray(self.descriptors[rows]))
        self.owners += [number] * len(rows)

    def near(self, number: int) -> list[int]:
        """The contents added so far that are near this one, in the order of their numbers."""
        if not self.index.ntotal:
            return []
        queries = np.ascontiguousarray(self.descriptors[self.rows[number]])
        try:
            _, _, found = self.index.range_search(queries, self.radius)
        except RuntimeError:  # not implemented for this kind of index
            similarities, rows = self.index.search(queries, min(MAX_NEIGHBOURS, self.index.ntotal))
            found = rows[(similarities >= self.radius) & (rows >= 0)]
        return sorted({self.owners[row] for row in found.tolist()})


def trained_index(index_type: str, descriptors: np.ndarray) -> faiss.Index:
    """An empty FAISS index, trained on a sample of `descriptors` (n, D) if its type needs that.

    Raises:
        InputError: if FAISS has no such type, or there is too little to train it on.
    """
    try:
        size = descriptors.shape[1]
        index = faiss.index_factory(size, index_type, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2] or str(error)
        reason = " ".join(reason.split())[:120]
        raise InputError(
            f"--index_type {index_type!r} is not a FAISS factory string ({reason})"
        ) from None
    if not index.is_trained:
        step = len(descriptors) // TRAINING_ROWS + 1
        try:
            index.train(np.ascontiguousarray(descriptors[::step]))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-120:]
            raise InputError(
                f"--index_type {index_type!r} cannot be trained on {len(descriptors)} descriptors"
                f" ({reason}); Flat needs no training"
            ) from None
    return set_search_effort(index)


def set_search_effort(index: faiss.Index) -> faiss.Index:
    """Make searches near-exact: a sixteenth of an inverted file's lists, 256 nodes of a graph."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = max(8, inner.nlist // 16)
    elif isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = 256
    return index
