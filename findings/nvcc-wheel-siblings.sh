#!/usr/bin/env bash
# nvidia-cuda-nvcc 13.0.88, with the nvidia-nvvm that pip takes beside it (13.5.37); seen 2026-11
#
# Input: NVIDIA's compiler from the package index, pinned to one version, and a kernel of one line.
# A good guess: the pin names a compiler; what it needs comes at the version that fits.
# Seen: its requirements (nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime) carry no version, so pip takes the
# newest; cicc of 13.5 writes PTX 9.5, which ptxas of 13.0 does not read, and nothing compiles. With all
# four pinned to 13.0.88 the same file compiles.
# Why it matters: a build that pins nvcc alone breaks on the day a newer toolkit is released.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo '__global__ void one(float *x) { x[threadIdx.x] = 1; }' >"$folder/one.cu"

# Installs what is given and compiles; prints the last line of what came.
compile() {
    rm -rf "$folder/venv"
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" -q --disable-pip-version-check install "$@"
    "$folder/venv/bin/pip" --disable-pip-version-check list 2>/dev/null | grep '^nvidia'
    local nvcc
    nvcc=$(find "$folder/venv" -name nvcc -type f)
    "$nvcc" -arch=sm_90a -cubin -o "$folder/one.cubin" "$folder/one.cu" 2>&1
}

if message=$(compile nvidia-cuda-nvcc==13.0.88); then
    echo "compiles now: $message" && exit 1
fi
echo "$message"
grep -q "Unsupported .version" <<<"$message"
compile nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.88
[ -s "$folder/one.cubin" ] && echo "compiled with all at 13.0"
