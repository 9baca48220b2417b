"""Keys without end that lie as a language model's do: in clusters of few dimensions each.

The numbers below make them as hard to search as the keys of a language model of WikiText-2. Of
200,000 keys, in brackets that model's: 90% of the variance lies in 70 dimensions (69), 0.9 of the
1,024 nearest lie in 18 of 512 lists (14), and 64-byte codes then find 0.85 of them (0.86).
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

CLUSTERS = 20_000
#: Dimensions in which a cluster extends, and in which the clusters' centres lie.
LATENT, OF_CENTRES = 32, 64
#: Sets of directions, in one of which a cluster extends.
DIRECTIONS = 8
#: The i-th dimension of either counts i ** -DECAY as much as the first.
DECAY = 0.75
#: Shares of a key's variance: where its cluster lies, where it lies in it, and noise.
CENTRE, INSIDE, NOISE = 0.6, 0.35, 0.01
#: Keys that one seed makes.
PART = 4096
#: Parts that are made at a time.
PARTS = 8
KEYS, QUERIES = 0, 1
#: Noise is drawn once, and a part begins at one of so many places in it: it decides hardly
#: anything, and to draw it anew for each key takes longer than all else.
OFFSETS = 2**22


class Mixture:
    """A mixture of clusters, the i-th of which has a weight of 1 / i (Zipf).

    Keys are drawn independently. Any of them can be made again, from the seed and its place.

    Args:
        width: dimensions of a key, D; a coordinate has a variance of about 1.
        seed: of everything.
        threads: that make keys.
    """

    def __init__(self, width: int, seed: int, threads: int) -> None:
        rng = np.random.default_rng(seed)
        self.width = width
        self._seed = seed
        self._pool = ThreadPoolExecutor(threads)
        _one_thread_a_product()
        weights = 1 / np.arange(1, CLUSTERS + 1)
        self._cumulative = np.cumsum(weights / weights.sum())
        centres = rng.standard_normal((CLUSTERS, OF_CENTRES), dtype=np.float32)
        self._centres = centres @ _directions(rng, (OF_CENTRES, width), CENTRE)
        self._inside = _directions(rng, (DIRECTIONS, LATENT, width), INSIDE)
        self._noise = rng.standard_normal(PART * width + OFFSETS, dtype=np.float32)
        self._noise *= np.float32(NOISE**0.5)

    def chunks(self, rows: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some keys in turn, from where a part begins: (n, D) float32, rounded, and rows (n,)."""
        for start in range(rows.start, rows.stop, PART * PARTS):
            yield self.keys(start, min(rows.stop - start, PART * PARTS))

    def sample(self, rows: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """About ``wanted`` of keys 0 to ``rows``: whole parts, spread evenly.

        Of keys that are independent of one another they are as good as any sample.
        """
        parts = min(-(-wanted // PART), rows // PART)
        chosen = np.linspace(0, rows // PART - 1, parts).astype(int)
        keys = np.empty((parts * PART, self.width), np.float32)
        for number, made in enumerate(self._made(chosen)):
            keys[number * PART : (number + 1) * PART] = made
        return keys, (chosen[:, None] * PART + np.arange(PART)).ravel()

    def keys(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys from ``start``, where a part begins, and their rows."""
        parts = range(start // PART, -(-(start + count) // PART))
        return np.concatenate(list(self._made(parts)))[:count], np.arange(start, start + count)

    def _made(self, parts: Iterable[int]) -> Iterator[np.ndarray]:
        """These parts of the keys, made in parallel, in order."""
        return self._pool.map(lambda part: self._part(KEYS, part), parts)

    def queries(self, count: int) -> np.ndarray:
        """Fresh draws, none of which is a key: (count, D) float32."""
        return np.concatenate([self._part(QUERIES, p) for p in range(-(-count // PART))])[:count]

    def _part(self, kind: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, kind, number])
        drawn = np.searchsorted(self._cumulative, rng.random(PART)).clip(max=CLUSTERS - 1)
        latent = rng.standard_normal((PART, LATENT), dtype=np.float32)
        start = rng.integers(OFFSETS)
        noise = self._noise[start : start + PART * self.width].reshape(PART, self.width)
        # Sorted by directions, so that keys of the same ones lie together.
        drawn = drawn[np.argsort(drawn % DIRECTIONS, kind="stable")]
        ends = np.cumsum(np.bincount(drawn % DIRECTIONS, minlength=DIRECTIONS)).tolist()
        keys: np.ndarray = self._centres[drawn]
        keys += noise
        for start, stop, directions in zip([0, *ends], ends, self._inside, strict=False):
            keys[start:stop] += latent[start:stop] @ directions
        return _rounded(keys)


def _one_thread_a_product() -> None:
    """Has NumPy multiply matrices in one thread, since threads that make keys would wait in turn.

    Making keys is then ten times as fast. FAISS has a library of its own for its products.
    """
    for library in ThreadpoolController().lib_controllers:
        if "numpy" in library.filepath:
            library.set_num_threads(1)


def _rounded(keys: np.ndarray) -> np.ndarray:
    """Numbers (n, D) float32 with as many significant bits as float16 has, in their place."""
    bits = keys.view(np.uint32)
    bits += np.uint32(1 << 12)
    bits &= np.uint32(0xFFFFE000)
    return keys


def _directions(rng: np.random.Generator, shape: tuple[int, ...], variance: float) -> np.ndarray:
    """Directions (..., n, D) of which each is less important than the last.

    Standard normal numbers, multiplied with them, have this variance in a coordinate.
    """
    drawn = rng.standard_normal(shape, dtype=np.float32)
    scales = np.arange(1, shape[-2] + 1) ** -DECAY
    scales *= (variance / (scales**2).sum()) ** 0.5
    return drawn * scales[:, None].astype(np.float32)
