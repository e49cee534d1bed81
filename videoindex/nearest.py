"""The nearest videos of an index by FAISS."""

import hashlib

import faiss
import numpy as np

import utils
from utils import InputError
from videoindex.store import BLOCK, one_line


class Nearest:
    """The video descriptors of a Store in a FAISS index, by inner product. index_type: a FAISS factory string.

    Flat is filled at load. Others are trained on the descriptors once, and kept in the folder where `save` is called; what
    was added since is put in at load.
    """

    def __init__(self, store, index_type="Flat"):
        self.store, self.index_type = store, index_type
        self.owners, videos = store.owners(), store.videos()
        tag = hashlib.sha256(index_type.encode()).hexdigest()[:8]
        self.path = store.folder / f"ann-{store.settings['generation']}-{tag}.faiss"
        self.index = self._saved() or trained(index_type, videos)
        for start in range(self.index.ntotal, len(videos), BLOCK):
            self.index.add(np.asarray(videos[start : start + BLOCK]))

    def _saved(self):
        if self.index_type == "Flat" or not self.path.exists():
            return None
        try:
            return tuned(faiss.read_index(str(self.path)))
        except RuntimeError:
            return None

    def save(self):
        if self.index_type != "Flat" and self.index.ntotal:
            with one_line(self.store.folder), utils.atomic(self.path) as temporary:
                faiss.write_index(self.index, str(temporary))

    def search(self, pieces, count):
        """pieces (P, D) of one video -> [(content, similarity)] of the `count` nearest, best first.

        A video's similarity is that of its most similar pair of windows. Ties go by the order in which videos were added.
        """
        found, k, total = {}, count, self.index.ntotal
        while total:
            k = min(k, total)
            similarities, rows = self.index.search(pieces, k)
            found = best_of(self.owners[rows.ravel()], similarities.ravel(), rows.ravel() >= 0)
            least = np.sort(list(found.values()))[-count:]
            # What was not returned is at most as similar as the last that was: enough, if `count` videos are above that.
            if k == total or (len(least) == count and least[0] >= similarities[:, -1].max()):
                break
            k *= 2  # several windows of one video, or holes, took places
        return sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count]

    def range_search(self, radius, batch=1024):
        """Yield (content, other content) of which two windows have at least the similarity `radius`; each pair once.

        Where FAISS has no range search for the kind of index, the 100 nearest of each window are looked at.
        """
        videos, seen = self.store.videos(), set()
        for start in range(0, len(videos), batch):
            ones, others = self._near(np.asarray(videos[start : start + batch]), radius)
            ones, others = self.owners[start + ones], self.owners[others]
            for pair in zip(
                np.minimum(ones, others).tolist(), np.maximum(ones, others).tolist(), strict=True
            ):
                if 0 <= pair[0] < pair[1] and pair not in seen:
                    seen.add(pair)
                    yield pair

    def _near(self, queries, radius, most=100):
        """queries (n, D) -> their numbers and the rows of `videos` at least `radius` alike, side by side."""
        try:
            limits, _, rows = self.index.range_search(queries, radius)
            return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), rows
        except RuntimeError:
            similarities, rows = self.index.search(queries, min(most, self.index.ntotal))
            ones, places = np.nonzero((similarities >= radius) & (rows >= 0))
            return ones, rows[ones, places]


def best_of(owners, similarities, real):
    """{owner: its highest similarity}, holes left out."""
    found = {}
    for owner, similarity in zip(owners[real].tolist(), similarities[real].tolist(), strict=True):
        if owner >= 0 and similarity > found.get(owner, -2.0):
            found[owner] = similarity
    return found


def trained(index_type, videos):
    """An empty FAISS index, trained on a sample of `videos` where its kind needs that."""
    try:
        index = faiss.index_factory(videos.shape[1], index_type, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2] or str(error)
        raise InputError(
            f"--index_type {index_type!r} is no FAISS factory string ({' '.join(reason.split())[:120]})"
        ) from None
    if not index.is_trained:
        step = len(videos) // (4 * BLOCK) + 1
        try:
            index.train(np.ascontiguousarray(videos[::step]))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-120:]
            raise InputError(
                f"--index_type {index_type!r} cannot be trained on {len(videos)} descriptors ({reason}); Flat needs no training"
            ) from None
    return tuned(index)


def tuned(index):
    """Search a sixteenth of an inverted file's lists, 256 candidates of a graph: near-exact, and still far from all."""
    inner = faiss.downcast_index(index)
    inner = (
        faiss.downcast_index(inner.index) if isinstance(inner, faiss.IndexPreTransform) else inner
    )
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = max(8, inner.nlist // 16)
    elif isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = 256
    return index
