"""What a user is told where the driver fails."""

import re

import pytest

import gpu_host

pytestmark = gpu_host.marks


@pytest.mark.parametrize(
    ("toolkit", "driver", "code", "expected"),
    [
        (13000, 13000, 0, "^$"),
        (13000, 13010, 0, "^$"),
        (13000, 0, 35, "no NVIDIA driver"),
        (13000, 0, 100, "no NVIDIA driver"),
        (
            13000,
            12040,
            35,
            r"too old: it serves CUDA 12\.4, this build needs CUDA 13\.0 \(driver 580 or newer",
        ),
        (
            12090,
            11080,
            35,
            r"too old: it serves CUDA 11\.8, this build needs CUDA 12\.0 \(driver 525 or newer",
        ),
        (13000, 13000, 100, "shows no GPU"),
        (13000, 13000, 999, "failed: unknown error"),
    ],
)
def test_driver_sentences(host, toolkit, driver, code, expected):
    assert re.search(expected, host.sentence(toolkit, driver, code, b"unknown error").decode())


def test_a_long_sentence_is_cut(host):
    assert len(host.sentence(13000, 13000, 999, b"x" * 500)) == 127
