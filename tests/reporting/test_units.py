"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from spp.reporting.units import duration, figure, share, size


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figure(5.12), "5.120"),
        (figure(14.894), "14.89"),
        (figure(123456.78), "123,456.8"),
        (figure(999.96), "1,000.0"),
        (figure(0.00004), "0.000"),
        (figure(math.inf), "infinite"),
        (figure(math.nan), "not a number"),
        (share(0.5), "50.0%"),
        (share(-0.123), "-12.3%"),
        (share(math.inf), "infinite"),
        (size(0), "0 B"),
        (size(1536), "2 KiB"),
        (size(3 * 2**20), "3 MiB"),
        (size(2.5 * 2**30), "2.50 GiB"),
        (duration(0.417), "0.42 s"),
        (duration(59.9), "59.9 s"),
        (duration(59.96), "1 min 00 s"),
        (duration(200), "3 min 20 s"),
        (duration(3599.8), "1 h 00 min"),
        (duration(7500), "2 h 05 min"),
        (duration(math.nan), "not a number"),
    ],
)
def test_quantities_are_written_for_people(written, expected):
    assert written == expected
