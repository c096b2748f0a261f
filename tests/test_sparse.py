"""attention_sparse against its definition: random calls, forward and gradients."""

import pytest
import reference_sparse
from sparse_cases import random_call, run

SEEDS = 10  # for each dtype


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_random_calls(dtype):
    for seed in range(SEEDS):
        call = random_call(seed, dtype)
        q, k, v, lists = call.arrays.values()
        results = run(call, poison=seed % 2 == 1)
        said = reference_sparse.complaints(
            results, q, k, v, lists, dout=call.dout, dlse=call.dlse, **call.keywords
        )
        assert not said, f"seed {seed}: {call}: {said}"
