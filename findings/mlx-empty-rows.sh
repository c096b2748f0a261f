#!/usr/bin/env bash
# mlx 0.32.4 (CPU build); seen 2026-11
#
# Input: mx.fast.scaled_dot_product_attention for a query row that sees no key.
# A good guess: one answer, 0 or NaN, however the keys are hidden.
# Seen: a bool mask gives the mean of all of v, hidden rows too; an additive mask of -inf gives NaN; with
# `sinks` both give 0; mask="causal" with more queries than keys (aligned bottom right) gives the mean of v.
# Why it matters: what such a row holds decides whether padding leaks into what is summed over rows.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 'mlx[cpu]==0.32.4'
"$venv/bin/python" - <<'EOF'
import mlx.core as mx, numpy as np

rng = np.random.default_rng(0)
q, k, v = (mx.array(rng.standard_normal((1, 1, n, 64), np.float32)) for n in (3, 2, 2))
see = mx.array([[True, True], [False, False], [True, False]])
add = mx.where(see, mx.array(0.0), mx.array(-np.inf))
sinks = mx.zeros((1,))

def row(i, **options):
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, **options)
    out = np.array(out)[0, 0, i]
    mean = np.array(v)[0, 0].mean(0)
    return "nan" if np.isnan(out).all() else "zero" if not out.any() else (
        "mean of v" if np.abs(out - mean).max() < 1e-6 else "else")

seen = {
    "bool": row(1, mask=see),
    "additive": row(1, mask=add),
    "bool, sinks": row(1, mask=see, sinks=sinks),
    "additive, sinks": row(1, mask=add, sinks=sinks),
    "causal": row(0, mask="causal"),
}
print(mx.default_device(), seen)
assert list(seen.values()) == ["mean of v", "nan", "zero", "zero", "mean of v"]
EOF
