"""Random cases out of everything there is, and the smallest like one that fails."""

from dataclasses import fields, replace

import numpy as np
from cases import DTYPES, FAMILIES, Case
from storage import STORAGES


def choose_case(choose, seed):
    """A case out of everything there is.

    `choose(options)` picks one of a sequence: hypothesis and the campaign's generator both can.
    """

    def maybe(chance, options, other=None):
        return choose(options) if choose(range(100)) < chance else other

    longest = choose((3, 20, 70, 150, 300))
    sizes = choose(
        (range(1, 20), range(1, 70), (8, 16, 32, 64), (64, 96, 128), (65, 127, 192, 255, 256))
    )
    if longest <= 20:
        sizes = choose((sizes, sizes, range(257, 600)))  # a GPU refuses those
    b, hk, group = maybe(3, (0,), choose((1, 1, 2, 3))), choose((1, 1, 2, 3)), choose((1, 1, 2, 4))
    sq, sk = (maybe(3, (0,), choose(range(1, longest + 1))) for _ in range(2))
    if longest == 20:  # few queries, many keys
        sk = maybe(30, range(300, 1200), sk)
    if choose(range(3)) == 0:
        sk = sq
    d = maybe(1, (0,), choose(sizes))
    dv = maybe(1, (0,), maybe(30, sizes, d))
    family = maybe(50, FAMILIES, "normal") if d else "normal"
    causal = choose((False, False, True, "top-left"))

    alibi = maybe(20, (1, 2), 0)
    packed, tail = None, (0, 0)
    if choose(range(100)) < 20:
        b = maybe(5, (0,), choose((1, 2, 4, 7)))

        def rows(most):
            ends = ((0,), range(min(most, 8) + 1), range(most + 1), (most,))
            return tuple(choose(choose(ends)) for _ in range(b))

        packed = (rows(sq), rows(sk))
        tail = (maybe(30, (1, 5), 0), maybe(30, (1, 200), 0))

    def lengths(limits):
        return tuple(choose(range(limit + 1)) for limit in limits)

    window = None
    if choose(range(100)) < 30:
        side = (None, 0, 1, *range(0, max(sk, 1), 1 + sk // 16))
        window = (choose(side), choose(side))
    elif choose(range(100)) < 20:  # at least one bound is negative
        low = choose(range(-sk - 1, 0))
        window = choose(((low, None), (None, low), (low, -low + choose(range(4)))))
        window = choose((window, window[::-1]))
    far = choose(range(100)) < 5 and not alibi  # as far away as it may be, and further
    if far and window:
        window = tuple(x if x is None else x * 2**29 for x in window)
    q_offset = None
    if causal != "top-left":
        offsets = (-(2**31), 2**31 - 1) if far else range(-sq - 2, sk + 3)
        how = choose(range(100))
        if how < 15:
            q_offset = choose(offsets)
        elif how < 30:
            q_offset = tuple(choose(offsets) for _ in range(b))
    if family == "single":
        window = (0, 0)
    mask = maybe(35, ("bool", "bool", *DTYPES[:3]))
    shape = tuple(choose((True, True, False)) for _ in range(4))
    dropout = maybe(15, (0.1, 0.5, 0.9, 1.0, 1e-7), 0.0)
    return Case(
        b=b,
        hq=hk * group,
        hk=hk,
        sq=sq,
        sk=sk,
        d=d,
        dv=dv,
        dtype=choose((*DTYPES[:3], *DTYPES)),  # the three that matter twice as often
        layout=choose(("bhsd", "bshd")),
        causal=causal,
        window=window,
        q_offset=q_offset,
        q_lengths=lengths(packed[0] if packed else [sq] * b) if choose(range(100)) < 15 else None,
        k_lengths=lengths(packed[1] if packed else [sk] * b) if choose(range(100)) < 20 else None,
        k_start=lengths([sk] * b) if choose(range(100)) < 15 and not packed else None,
        mask=mask,
        mask_shape=shape if mask else Case.mask_shape,
        mask_rank=choose((1, 2, 3, 4)) if mask else 4,
        softcap=maybe(20, (0.5, 5.0, 30.0, 50.0, 1.1, 1e-46, 1e6, 1e300), 0.0),
        alibi=alibi,
        sink=maybe(20, (True,), False),
        scale=maybe(25, (1.0, -0.3, 0.0, 0.02)),
        dropout=dropout,
        packed=packed,
        tail=tail,
        storage=choose(STORAGES),
        family=family,
        out=maybe(30, STORAGES[:-1]),
        seed=seed,
    )


def random_case(seed):
    rng = np.random.default_rng([seed, 0x5EED])
    return choose_case(lambda options: options[int(rng.integers(len(options)))], seed)


def shrink(case, fails):
    """The same failure with as many fields at their defaults as possible."""
    for field in fields(case):
        if getattr(case, field.name) == field.default or field.name == "seed":
            continue
        simpler = replace(case, **{field.name: field.default})
        try:
            if fails(simpler):
                case = simpler
        except Exception:  # not a legal case
            continue
    return case
