"""`out` must not overlap any input: each of them is looked at, the small ones too."""

import fastattn
import numpy as np
import pytest

INPUTS = {  # name -> its array inside the bytes of `out`
    "mask": lambda raw: raw[:16].view(bool).reshape(4, 4),
    "q_lengths": lambda raw: raw[:8].view(np.int32),
    "k_lengths": lambda raw: raw[:8].view(np.int32),
    "k_start": lambda raw: raw[:8].view(np.int32),
    "q_offset": lambda raw: raw[:8].view(np.int32),
    "alibi_slopes": lambda raw: raw[:8].view(np.float32),
    "sink": lambda raw: raw[:8].view(np.float32),
    "seed": lambda raw: raw[:8].view(np.int64),
}
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")


def arrays(*shape):
    raw = np.zeros(np.prod(shape) * 4, np.uint8)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, *shape), dtype=np.float32)
    return q, k, v, raw, raw.view(np.float32).reshape(shape)


@pytest.mark.parametrize("name", INPUTS)
def test_each_input(name):
    q, k, v, raw, out = arrays(2, 2, 4, 8)
    given = {name: INPUTS[name](raw), **({"dropout_p": 0.5} if name == "seed" else {})}
    with pytest.raises(ValueError, match=rf"^`out` must not overlap `{name}` in memory$"):
        fastattn.attention(q, k, v, out=out, **given)
    assert not raw.any()
    given[name] = given[name].copy()
    assert fastattn.attention(q, k, v, out=out, **given) is out


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_packed_sequences(name):
    q, k, v, raw, out = arrays(4, 2, 8)
    raw[:12].view(np.int32)[:] = 0, 2, 4
    given = dict.fromkeys(OFFSETS, np.array([0, 2, 4], np.int32)) | {name: raw[:12].view(np.int32)}
    with pytest.raises(ValueError, match=rf"^`out` must not overlap `{name}` in memory$"):
        fastattn.attention_varlen(q, k, v, max_seqlen_q=2, max_seqlen_k=2, out=out, **given)
    assert not raw[12:].any()
