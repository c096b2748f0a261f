#!/usr/bin/env bash
# safetensors 0.8.0 with ml_dtypes 0.6.0, jax 0.10.2; seen 2026-11
#
# Input: a bfloat16 NumPy array written by safetensors.numpy, read back from the file and from its bytes.
# A good guess: load(bytes of a file) and load_file(file) are one function.
# Seen: load_file gives bfloat16; load of the same bytes raises KeyError('BF16'). safetensors.flax likewise,
# which cannot read what its own save() made.
# Why it matters: bf16 weights from memory (an archive, a socket) need a file, or another reader.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install \
    numpy==2.4.6 ml_dtypes==0.6.0 jax==0.10.2 flax==0.12.8 safetensors==0.8.0
"$venv/bin/python" - <<'EOF'
import os, tempfile
import jax.numpy as jnp, ml_dtypes, numpy as np
import safetensors.flax, safetensors.numpy

x = np.arange(6).astype(ml_dtypes.bfloat16)
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "x")
    for module, array in (safetensors.numpy, x), (safetensors.flax, jnp.asarray(x)):
        module.save_file({"x": array}, path)
        with open(path, "rb") as file:
            content = file.read()
        assert content == module.save({"x": array})
        loaded = module.load_file(path)["x"]
        print(module.__name__, "load_file", loaded.dtype, end=", load ")
        assert loaded.dtype == x.dtype and np.array_equal(np.asarray(loaded), x)
        try:
            module.load(content)
        except KeyError as e:
            print(repr(e))
            assert e.args == ("BF16",)
        else:
            raise SystemExit("reads it now")
EOF
