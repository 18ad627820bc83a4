"""Irreps as strings: what they mean, and what is refused."""

import pytest
from e3nn import o3
from hypothesis import given
from hypothesis import strategies as st

from implicit_steer.irreps import Gate, ImplicitPointConv, InteractionBlock, Irrep, Irreps, Linear, Norm

TERMS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6), st.sampled_from("eo")), max_size=6)


@given(TERMS)
def test_the_layout_is_e3nns(terms):
    text = " + ".join(f"{multiplicity}x{degree}{parity}" for multiplicity, degree, parity in terms)
    ours, theirs = Irreps.of(text), o3.Irreps(text)
    assert ours.size == theirs.dim
    assert [(start, start + term.size) for start, term in zip(ours.starts, ours, strict=True)] == [
        (s.start, s.stop) for s in theirs.slices()
    ]
    assert Irreps.of(theirs) == ours == Irreps.of(str(ours))
    assert Irreps.of([(multiplicity, (ir.l, ir.p)) for multiplicity, ir in theirs]) == ours


@pytest.mark.parametrize(
    ("given_", "size", "text"),
    [
        ("1o", 3, "1x1o"),
        ("", 0, ""),
        ("4x0+2x1", 10, "4x0+2x1"),
        ("2x1o + 0x3e + 1o", 9, "2x1o+1x1o"),
        (o3.Irrep("2e"), 5, "1x2e"),
        ([(3, "1o"), (2, Irrep(0, 1))], 11, "3x1o+2x0e"),
    ],
)
def test_many_ways_to_write_them(given_, size, text):
    irreps = Irreps.of(given_)
    assert (irreps.size, str(irreps)) == (size, text)


@pytest.mark.parametrize("token", ["1q", "x1o", "-1x0e", "1.5x0e", "4x", "o1", "1eo", "16*0e", "4x0e,1o"])
def test_nonsense_is_named(token):
    with pytest.raises(ValueError, match="irreps_in") as error:
        ImplicitPointConv(f"2x0e + {token}", "2x0e")
    assert repr(token) in str(error.value)
    assert "16x0e + 8x1o" in str(error.value)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Irreps.of(5), TypeError, "irreps: expected irreps such as '16x0e + 8x1o'"),
        (lambda: Irreps.of([3]), TypeError, "pairs (multiplicity, irrep)"),
        (lambda: Irreps.of("2x0e + 2x1"), ValueError, "a parity in every term or in none"),
        (lambda: Irreps.of("2x12o"), ValueError, "degrees up to 11, got '2x12o'"),
        (lambda: ImplicitPointConv("4x0e", "4x1e"), ValueError, "never 1e or 0o"),
        (lambda: ImplicitPointConv("", "4x1o"), ValueError, "irreps that '' can reach"),
        (lambda: ImplicitPointConv("4x0e", "4x1"), ValueError, "irreps of O(3), with parities, as irreps_in = '4x0e'"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", -1), ValueError, "edge_attr: expected an integer >= 0"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", n_layers=0), ValueError, "n_layers"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", n_channels=2.0), ValueError, "n_channels"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", activation="sin"), ValueError, "activation"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", norm="layer"), ValueError, "norm"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", cutoff=-1.0), ValueError, "cutoff"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", cutoff="2"), ValueError, "cutoff"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", width=0.0), ValueError, "width"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", aggr="max"), ValueError, "aggr"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", depthwise=1), TypeError, "depthwise"),
        (lambda: ImplicitPointConv("4x0e", "4x1o", backend="tpu"), ValueError, "backend"),
        (lambda: Linear("4x0e", "4x1o"), ValueError, "irreps_out: expected an irrep of irreps_in"),
        (lambda: Linear("4x0e", "4x0"), ValueError, "irreps_out"),
        (lambda: Gate(""), ValueError, "irreps_out"),
        (lambda: Gate("4x0e", "sin"), ValueError, "function"),
        (lambda: Norm("4x0e", eps=0.0), ValueError, "eps"),
        (lambda: InteractionBlock("4x0e", "4x1o", degree=0.0), ValueError, "degree"),
        (lambda: InteractionBlock("4x0e", "4x1o", node_attr=-1), ValueError, "node_attr"),
    ],
)
def test_refused(make, kind, words):
    with pytest.raises(kind) as error:
        make()
    assert words in str(error.value)
