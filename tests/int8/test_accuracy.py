"""The table of signal to noise: the numbers the scheme promises (A5 of the targets)."""

from __future__ import annotations

import pytest

from int8.accuracy import SCHEMES, int8_accuracy

LEAST_DB = {"gaussian": 38.0, "outliers": 34.0, "gelu": 36.0}


@pytest.fixture(scope="module")
def table() -> dict:
    return int8_accuracy(tokens=64, outputs=128)


@pytest.mark.parametrize("kind", LEAST_DB)
@pytest.mark.parametrize("features", [1792, 4096])
def test_the_own_scheme_reaches_its_targets(kind: str, features: int) -> None:
    own = int8_accuracy(tokens=64, features=features, outputs=128)["schemes"]["own"][kind]
    assert own["sqnr_db"] >= LEAST_DB[kind]
    assert abs(own["gain"] - 1) <= 0.001


@pytest.mark.parametrize("kind", LEAST_DB)
def test_truncating_costs_five_decibels_and_the_gain(kind: str, table: dict) -> None:
    own, theirs = table["schemes"]["own"][kind], table["schemes"]["community_truncating_128"][kind]
    assert own["sqnr_db"] - theirs["sqnr_db"] > 5
    assert theirs["gain"] < 0.99


def test_the_rotation_is_what_outliers_need(table: dict) -> None:
    schemes = table["schemes"]
    assert (
        schemes["own"]["outliers"]["sqnr_db"] - schemes["own_unrotated"]["outliers"]["sqnr_db"] > 8
    )


def test_every_scheme_is_in_the_table(table: dict) -> None:
    assert table["benchmark"] == "int8-accuracy"
    assert set(table["schemes"]) == set(SCHEMES)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        int8_accuracy(tokens=0)
