#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, on the CPU; seen 2026-11
#
# Input: jax.nn.dot_product_attention of ones, (1, 8, 2, 16), in float32, bfloat16 and float16, as it stands and
# under jax.jit.
# A good guess: jit changes how fast it is, not whether it runs; float16 runs where bfloat16 does.
# Seen: all six run but one. float16 under jit is a ValueError, "The precision 'F16_F16_F32' is not supported by
# dot_general on CPU"; the same call without jit gives a result.
# Why it matters: float16 weights that were tried in a notebook fail once the model is compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import jax

attention = jax.nn.dot_product_attention
seen = {}
for dtype in ("float32", "bfloat16", "float16"):
    x = jax.numpy.ones((1, 8, 2, 16), dtype)
    for name, call in (("as it stands", attention), ("under jit", jax.jit(attention))):
        try:
            said = f"gives {call(x, x, x).dtype}"
        except ValueError as error:
            said = str(error)
        seen[dtype, name] = said
        print(f"{dtype} {name}: {said}")
refused = {where: said for where, said in seen.items() if not said.startswith("gives ")}
assert list(refused) == [("float16", "under jit")], refused
assert "F16_F16_F32" in refused["float16", "under jit"]
EOF
