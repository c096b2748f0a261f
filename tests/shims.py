"""Functions that have other libraries' names, judged by the reference: tensors (b, s, h, d)."""

import numpy as np
import reference
import reference_backward
import torch


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def flipped(x):
    """(b, s, h, d) of torch -> (b, h, s, d) of NumPy."""
    return x.detach().transpose(1, 2).numpy()


def judge(out, lse, tensors, dout, gradients, **keywords):
    """No complaints about a result and the gradients of q, k and v; lse may be None."""
    q, k, v = map(flipped, tensors)
    lse = None if lse is None else lse.detach().numpy()
    complaints = reference.check(flipped(out), lse, q, k, v, **keywords)
    found = dict(zip(("dq", "dk", "dv"), map(flipped, gradients), strict=True))
    complaints += reference_backward.check(found, flipped(dout), q, k, v, **keywords)
    assert not complaints, "\n".join(complaints)


def judge_blocks(out, lse, tensors, dout, gradients, blocks, keywords_of):
    """The same of sequences that are packed: tensors (total, h, d), lse (h, total).

    `blocks` are each sequence's rows of q and of k, (start, end) twice; rows of k outside of them
    have gradients of 0, rows of q outputs of 0.
    """
    q_seen, k_seen = (torch.zeros(len(x), dtype=bool) for x in tensors[:2])
    for n, ((q0, q1), (k0, k1)) in enumerate(blocks):
        rows = slice(q0, q1), slice(k0, k1), slice(k0, k1)
        q_seen[rows[0]], k_seen[rows[1]] = True, True
        if q0 == q1:
            continue
        part = [x[r][None] for x, r in zip(tensors, rows, strict=True)]
        found = [x[r][None] for x, r in zip(gradients, rows, strict=True)]
        of_rows = None if lse is None else lse[None, :, rows[0]]
        judge(out[None, rows[0]], of_rows, part, dout[None, rows[0]], found, **keywords_of(n))
    assert not out[~q_seen].any() and not gradients[0][~q_seen].any()
    assert not gradients[1][~k_seen].any() and not gradients[2][~k_seen].any()


def array(x):
    return np.asarray(x, np.float32)
