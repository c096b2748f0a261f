"""Leading dimensions that no single stride can walk: one run of a backend after the other."""

import itertools

import fastattn
import numpy as np
import pytest
import reference
from conftest import needs

LEADS = {  # of q, k and v; no two neighbours fold into one
    "two": ((3, 1), (1, 4), (3, 4)),
    "three": ((3, 1, 4), (1, 2, 4), (3, 2, 1)),
    "four": ((2, 1, 3, 1), (1, 2, 3, 2), (2, 2, 1, 2)),
    "ones between": ((3, 1, 1, 4), (1, 2, 1, 4), (3, 2, 1, 1)),
}


@needs("torch")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lead", LEADS)
def test_each_run_has_its_own_arrays(lead, masked):
    """Each index of the leading dimensions is a call of its own."""
    import torch

    rng = np.random.default_rng(1)
    shapes = ((2, 5, 8), (2, 7, 8), (2, 7, 6))
    arrays = [
        rng.standard_normal((*mine, *shape)).astype(np.float32)
        for mine, shape in zip(LEADS[lead], shapes, strict=True)
    ]
    full = np.broadcast_shapes(*LEADS[lead])
    mask = rng.random((*LEADS[lead][2], 1, 5, 7)) < 0.7 if masked else None
    q, k, v = map(torch.from_numpy, arrays)
    given = None if mask is None else torch.from_numpy(mask)
    out = fastattn.scaled_dot_product_attention(q, k, v, attn_mask=given).numpy()
    assert out.shape == (*full, 2, 5, 6)
    wide = [np.broadcast_to(x, (*full, *x.shape[-3:])) for x in arrays]
    for at in itertools.product(*map(range, full)):
        one = [x[at][None] for x in wide]
        keywords = (
            {} if mask is None else {"mask": np.broadcast_to(mask, (*full, 1, 5, 7))[at][None]}
        )
        assert not reference.check(out[at][None], None, *one, **keywords), at
