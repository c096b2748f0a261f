"""Arrays inside larger buffers that hold NaN, with strides of many kinds."""

from dataclasses import dataclass

import numpy as np

STORAGES = ("plain", "padded", "swapped", "strided", "flipped", "expanded")


@dataclass
class Stored:
    """A strided array inside a buffer: element (0, ...) is base[offset], strides count elements."""

    base: np.ndarray
    shape: tuple
    strides: tuple
    offset: int

    def __post_init__(self):
        self.before = self.base.tobytes()

    @property
    def view(self):
        buffer, size = self.base.view(np.uint8), self.base.itemsize
        return np.ndarray(
            self.shape,
            self.base.dtype,
            buffer,
            self.offset * size,
            [s * size for s in self.strides],
        )

    def untouched(self, around=None):
        """Whether the buffer holds its old bytes; with `around`, those outside the view."""
        if around is None:
            return self.base.tobytes() == self.before
        inside = np.zeros(self.base.shape, bool)
        replace_base = Stored(inside, self.shape, self.strides, self.offset)
        replace_base.view[...] = True
        size = self.base.itemsize
        old = np.frombuffer(self.before, np.uint8).reshape(-1, size)
        new = np.frombuffer(self.base.tobytes(), np.uint8).reshape(-1, size)
        return bool((old[~inside] == new[~inside]).all())


def poison_of(dtype):
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).max if dtype.kind in "iu" else dtype.type(np.nan)


def store(values, storage, rng, constant=()):
    """Puts `values` into a poisoned buffer.

    `constant`: the axes along which they are equal; "expanded" storage gives them stride 0.
    """
    rank, dtype = values.ndim, values.dtype
    order, pad, step, flips = list(range(rank)), [0] * rank, 1, ()
    zero = tuple(constant) if storage == "expanded" else ()
    if storage == "swapped":  # e.g. (b, h, s, d) kept as (b, s, h, d)
        order[:-1] = rng.permutation(rank - 1).tolist()
    elif storage == "strided":  # the last dimension is not contiguous
        order, step = rng.permutation(rank).tolist(), int(rng.integers(1, 3))
    elif storage == "flipped":
        flips = [axis for axis in range(rank) if rng.random() < 0.5]
    if storage not in ("plain", "expanded"):
        pad = rng.integers(0, 4, rank).tolist()

    strides, size = [0] * rank, step
    for axis in reversed(order):
        if axis not in zero:
            strides[axis] = size
            size *= max(values.shape[axis], 1) + pad[axis]
    guard = 0 if storage == "plain" else int(rng.integers(0, 9))
    offset = guard
    for axis in flips:
        offset += strides[axis] * (max(values.shape[axis], 1) - 1)
        strides[axis] = -strides[axis]
    base = np.full(size + 2 * guard, poison_of(dtype), dtype)
    stored = Stored(base, values.shape, tuple(strides), offset)
    stored.view[...] = values
    return Stored(base, values.shape, tuple(strides), offset)
