import pytest
import torch

from lit_compress.compress.weight_cache import WeightCache


def make(log, key, size=4, bias=None):
    def made():
        log.append(key)
        return torch.full((size,), 1.0), bias

    return made


def test_what_was_used_longest_ago_goes_first():
    log = []
    cache = WeightCache(max_bytes=2 * 16)
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, make(log, key))
    assert log == ["a", "b", "c", "b"]
    assert cache.num_bytes == 32


def test_biases_count_and_the_newest_stays_in_any_case():
    log = []
    cache = WeightCache(max_bytes=10)
    cache.get("large", make(log, "large", 100, torch.ones(5)))
    assert cache.num_bytes == 420
    cache.get("large", make(log, "large", 100))
    assert log == ["large"]
    cache.clear()
    assert cache.num_bytes == 0
    cache.get("large", make(log, "large"))
    assert log == ["large", "large"]


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="max_bytes is -1, expected at least 0"):
        WeightCache(-1)
