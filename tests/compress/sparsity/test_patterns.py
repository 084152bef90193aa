import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.sparsity.magnitude import keep_largest
from lit_compress.compress.sparsity.patterns import Block, NofM, Unstructured, parse_pattern

nofm = st.tuples(st.integers(1, 7), st.integers(1, 7)).map(lambda t: NofM(t[0], t[0] + t[1]))
blocks = st.tuples(st.integers(1, 4), st.integers(2, 4)).map(lambda t: Block(*t))


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "4x1", "1x4", "16x2"])
def test_names_go_both_ways(text):
    assert str(parse_pattern(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense", "pattern is 'dense', expected 'unstructured', 'n:m'"),
        ("4:4", "keeps 4 of 4; expected at least 1 and fewer than all"),
        ("0:4", "keeps 0 of 4"),
        ("1x1", "1x1 is no block"),
        ("0x4", "0x4 is no block"),
        (124, "write pattern: '2:4'"),
    ],
)
def test_bad_names_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


@settings(deadline=None)
@given(nofm, st.integers(1, 3), st.integers(1, 4), st.data())
def test_n_of_m_holds_in_every_group_at_its_sparsity(pattern, groups, outputs, data):
    shape = (outputs, groups * pattern.m, 3, 2)
    values = data.draw(st.integers(0, 2**31))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(values)).round(decimals=1)
    removable = round(pattern.max_sparsity * weight.numel())
    scores = pattern.scores(weight)
    assert int(scores.isfinite().sum()) == removable
    mask = pattern.expand(keep_largest(scores, removable), weight.shape)
    kept = mask.movedim(1, -1).reshape(-1, pattern.m)
    assert (kept.sum(1) == pattern.n).all()
    magnitudes = weight.abs().movedim(1, -1).reshape(-1, pattern.m)
    smallest_kept = magnitudes.masked_fill(~kept, torch.inf).min(1).values
    largest_gone = magnitudes.masked_fill(kept, -torch.inf).max(1).values
    assert (largest_gone <= smallest_kept).all()
    # On the way there, the zeros are some of those.
    halfway = pattern.expand(keep_largest(scores, removable // 2), weight.shape)
    assert not (mask & ~halfway).any()


@settings(deadline=None)
@given(blocks, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_blocks_live_or_die_as_one(pattern, down, across, seed):
    shape = torch.Size((down * pattern.rows, across * pattern.cols, 2, 3))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scores = pattern.scores(weight)
    assert scores.shape == (pattern.num_units(shape),)
    by_hand = weight[: pattern.rows, : pattern.cols, 0, 0].abs().mean()
    assert scores[0] == pytest.approx(by_hand.item())
    mask = pattern.expand(keep_largest(scores, len(scores) // 2), shape)
    cut = mask.reshape(down, pattern.rows, across, pattern.cols, 2, 3)
    assert (cut.amax((1, 3)) == cut.amin((1, 3))).all()
    assert int((~mask).sum()) == len(scores) // 2 * pattern.rows * pattern.cols


def test_misfits_say_why():
    assert Unstructured().misfit(torch.Size((3, 5))) is None
    assert NofM(2, 4).misfit(torch.Size((3, 8, 3, 3))) is None
    assert NofM(2, 4).misfit(torch.Size((3, 5))) == (
        "5 input channels are not a multiple of 4 (pattern 2:4)"
    )
    assert Block(4, 1).misfit(torch.Size((6, 5))) == (
        "shape (6, 5) cannot be cut into blocks of 4x1"
    )
