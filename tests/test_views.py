"""Outputs that are still to come are described as they will be bound, so that a choice holds."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include "views.h"

/* A contiguous array; of one index the stride is anything, as frameworks have it. */
static fa_array contiguous(int32_t ndim, const int64_t *shape) {
    fa_array a;
    int64_t stride = 1;
    memset(&a, 0, sizeof a);
    a.data = &a, a.ndim = ndim;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        a.shape[i] = shape[i], a.stride[i] = shape[i] == 1 ? 77 : stride;
        if (shape[i]) stride *= shape[i];
    }
    return a;
}

static int differ(fa_tensor *expected, fa_tensor *bound) {
    for (int i = 0; i < 4; i++)
        if (expected->shape[i] != bound->shape[i] ||
            (bound->shape[i] > 1 && expected->stride[i] != bound->stride[i]))
            return 1;
    return !expected->data;
}

int main(void) {
    int wrong = 0, asked = 0;
    for (int n = 0; n < 256; n++) {
        static const int64_t sizes[4] = {1, 2, 3, 5};
        const int64_t shape[4] = {sizes[n % 4], sizes[n / 4 % 4], sizes[n / 16 % 4], sizes[n / 64]};
        fa_tensor expected, bound;
        for (int32_t ndim = 2; ndim <= 3; ndim++, asked++) {
            const fa_array lse = contiguous(ndim, shape);
            fa_expect_lse(&expected, ndim, shape);
            fa_bind_lse(&bound, &lse);
            wrong += differ(&expected, &bound);
        }
        for (int layout = 0; layout < 2; layout++, asked++) {
            const fa_array out = contiguous(4, shape);
            fa_expect(&expected, 4, shape, (fa_layout)layout);
            fa_bind(&bound, &out, (fa_layout)layout);
            wrong += differ(&expected, &bound);
        }
    }
    printf("%d of %d\n", wrong, asked);
    return 0;
}
"""


@pytest.mark.skipif(
    not (ROOT / "csrc").exists() or not shutil.which("gcc"), reason="needs the sources and gcc"
)
def test_what_is_expected_is_what_is_bound(tmp_path):
    source, program = tmp_path / "driver.c", tmp_path / "driver"
    source.write_text(DRIVER)
    sources = [source, ROOT / "csrc" / "views.c", ROOT / "csrc" / "check_array.c"]
    subprocess.run(["gcc", "-std=c11", f"-I{ROOT}/csrc", *sources, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert said == "0 of 1024\n"
