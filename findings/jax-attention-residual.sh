#!/usr/bin/env bash
# jax 0.10.2 on the CPU; seen 2026-11
#
# Input: jax.nn.dot_product_attention with return_residual=True, on either half of the keys; both outputs merged by
# their logsumexp, as long contexts are; and the gradient of the whole. Once more in bfloat16.
# A good guess: what is merged is attention to all keys, and so is its gradient; the logsumexp is float32, as in the
# paper that its documentation names.
# Seen: the merged output is right to the last digits, its gradient is not: none comes through the logsumexp, which is
# behind stop_gradient. For bfloat16 inputs it is bfloat16, off by 0.01.
# Why it matters: training on merged parts, or with a loss on the logsumexp, runs, and learns something else.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 jax==0.10.2
"$venv/bin/python" - <<'EOF'
import jax, jax.numpy as jnp

attend = jax.nn.dot_product_attention
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))

def merged(k):
    parts = [attend(q, k[:, half], v[:, half], return_residual=True) for half in (slice(4), slice(4, 8))]
    weights = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), 0)[..., None]
    return sum(w * out for w, (out, _) in zip(weights, parts))

def whole(k):
    return attend(q, k, v)

def logsumexp(q, k):
    return jax.nn.logsumexp(jnp.einsum("bihd,bjhd->bihj", q, k) / 4, -1)

def largest(x):
    return float(jnp.abs(x).max())

got, want = (jax.grad(lambda k: (f(k) ** 2).sum())(k) for f in (merged, whole))
print("merged off by", largest(merged(k) - whole(k)), "its gradient by", largest(got - want), "of", largest(want))
by_lse = jax.grad(lambda k: attend(q, k, v, return_residual=True)[1].sum())(k)
print("gradient of the logsumexp", largest(by_lse), "by hand", largest(jax.grad(lambda k: logsumexp(q, k).sum())(k)))
low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
lse = attend(*low, return_residual=True)[1]
error = largest(lse.astype(float) - logsumexp(*(x.astype(float) for x in low[:2])))
print(lse.dtype, "off by", error)
assert largest(merged(k) - whole(k)) < 1e-5 and largest(got - want) > 0.1 * largest(want)
assert by_lse.shape == k.shape and not by_lse.any()
assert lse.dtype == jnp.bfloat16 and error > 5e-3
EOF
