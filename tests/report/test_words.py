from __future__ import annotations

import pytest

from omega_qvla.policies.base import sites_of
from omega_qvla.report.words import (
    condition_words,
    error_words,
    listing,
    points,
    quantity,
    site_place,
    site_words,
)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.language_model.layers.3.mlp.down_proj", ("a.language_model.layers", 3, "down")),
        ("blocks.11.attn1.to_out.0", ("blocks", 11, "out")),
        ("net.ff.2", ("net.ff", 2, "linear")),
        ("multi_modal_projector.linear", ("multi_modal_projector.linear", None, "linear")),
        ("h.7.something.of_their.own", ("h", 7, "something.of_their.own")),
    ],
)
def test_a_sites_name_says_where_it_belongs(name, place):
    assert site_place(name) == place


@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_every_site_of_the_native_policies_has_words_of_its_own(family, request):
    sites = sites_of(request.getfixturevalue(family))
    words = [site_words(site.name, site.component) for site in sites]
    assert len(set(words)) == len(words)
    assert all("_proj" not in word and "." not in word for word in words)


def test_numbers_read_the_same_everywhere():
    assert condition_words("stress:30") == "stress 30×"
    assert condition_words("plain") == "plain"
    assert [error_words(v) for v in (None, 0.0, 0.011234)] == ["–", "0", "0.0112"]
    assert [points(v) for v in (-0.018, 0.0, 0.004)] == ["−1.8", "+0.0", "+0.4"]
    assert [listing("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert [quantity(n, "episode") for n in (1, 1200)] == ["1 episode", "1,200 episodes"]
