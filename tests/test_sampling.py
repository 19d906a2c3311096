"""Drawing tokens: greedy, temperature and top-p against a naive distribution, extremes, the seed; and how an answer
ends."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge.config import Sampling
from dycoke_edge.runtime.loop import Ending
from dycoke_edge.runtime.repetition import LONGEST, Repetition
from dycoke_edge.runtime.sampling import Sampler, nucleus

LOGITS = np.array([1.0, 3.0, 2.0, 2.5, -1.0, 0.0], np.float32)
DRAWS = 10_000


def draw(logits: NDArray[np.float32], count: int, temperature: float, top_p: float = 1.0, seed: int = 0) -> list[int]:
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=seed))
    return [sampler(logits) for _ in range(count)]


def naive(logits: NDArray[np.float32], temperature: float, top_p: float) -> list[float]:
    """The distribution, one token at a time."""
    weights = [2.718281828459045 ** (float(logit) / temperature) for logit in logits]
    shares = [weight / sum(weights) for weight in weights]
    kept: dict[int, float] = {}
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if not kept or sum(kept.values()) < top_p:
            kept[token] = shares[token]
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(shares))]


def test_greedy_takes_the_best_and_of_equals_the_first() -> None:
    assert draw(LOGITS, 3, temperature=0) == [1, 1, 1]
    assert draw(np.array([0, 7, 7, 7], np.float32), 1, temperature=0) == [1]
    assert draw(np.zeros(5, np.float32), 1, temperature=0) == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.3])
def test_frequencies_are_those_of_the_naive_distribution(temperature: float, top_p: float) -> None:
    """Within five standard deviations of a binomial count; a token outside the nucleus never comes."""
    expected = np.array(naive(LOGITS, temperature, top_p))
    counts = np.bincount(draw(LOGITS, DRAWS, temperature, top_p), minlength=len(LOGITS))
    bound = 5 * np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= bound + 1e-6).all()


def test_the_same_seed_draws_the_same_tokens() -> None:
    first = draw(LOGITS, 50, temperature=1.0, seed=7)
    assert draw(LOGITS, 50, temperature=1.0, seed=7) == first
    assert draw(LOGITS, 50, temperature=1.0, seed=8) != first


def test_samplers_do_not_share_their_random_state() -> None:
    alone = draw(LOGITS, 20, temperature=1.0)
    one, other = (Sampler(Sampling(temperature=1.0)) for _ in range(2))
    both = [(one(LOGITS), other(LOGITS)) for _ in range(20)]
    assert both == list(zip(alone, alone, strict=True))


def test_top_p_0_takes_only_the_best_and_of_equals_the_first() -> None:
    assert set(draw(LOGITS, 50, temperature=5.0, top_p=0.0)) == {1}
    assert set(draw(np.zeros(4, np.float32), 50, temperature=1.0, top_p=0.0)) == {0}


def test_top_p_1_keeps_every_token() -> None:
    assert set(draw(np.zeros(4, np.float32), 200, temperature=1.0)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, [1]), (0.5, [1]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    shares = nucleus(np.array([0.25, 0.5, 0.125, 0.125]), top_p)
    assert np.flatnonzero(shares).tolist() == kept
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0] == (pytest.approx(shares[1] / 2) if len(kept) > 1 else 0)


def test_the_nucleus_leaves_its_argument_alone() -> None:
    shares = np.array([0.25, 0.5, 0.25])
    nucleus(shares, 0.1)
    assert shares.tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30, 1e-3])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_near_zero_is_greedy_and_does_not_overflow(temperature: float, top_p: float) -> None:
    assert set(draw(LOGITS, 10, temperature, top_p)) == {1}
    assert set(draw(-1000 * LOGITS - 1, 10, temperature, top_p)) == {4}


def test_a_temperature_near_zero_still_draws_among_equals() -> None:
    assert set(draw(np.array([5, 1, 5], np.float32), 50, temperature=5e-324)) == {0, 2}


@pytest.mark.parametrize("temperature", [1e30, 1.7e308])
def test_a_huge_temperature_draws_all_tokens_alike(temperature: float) -> None:
    counts = np.bincount(draw(LOGITS, 3000, temperature), minlength=6)
    assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all()


@pytest.mark.parametrize("largest", [1e4, 3e38])
def test_large_logits_do_not_overflow(largest: float) -> None:
    assert draw(np.array([-largest, largest, 0], np.float32), 5, temperature=1.0) == [1] * 5


# Answers that repeat themselves


def stopped_after(tokens: Iterable[int], limit: int = Sampling().repeat_limit) -> int | None:
    """How many tokens are let through before it is noticed."""
    repetition = Repetition(limit)
    return next((number for number, token in enumerate(tokens, 1) if repetition.push(token)), None)


@pytest.mark.parametrize(
    ("phrase", "after"),
    [
        (1, 32),  # "aaaa...": as many tokens as the limit allows
        (2, 32),
        (5, 32),
        (10, 32),
        (11, 33),  # three times
        (40, 120),
        (LONGEST, 3 * LONGEST),
        (LONGEST + 1, None),
    ],
)
def test_a_repetition_is_a_phrase_three_times_in_a_row(phrase: int, after: int | None) -> None:
    again = list(range(100, 100 + phrase)) * (500 // phrase)
    assert stopped_after(again) == after
    before = list(range(50)) + [100] * 31 + [7]
    assert stopped_after(before + again) == (after and after + len(before))


@pytest.mark.parametrize(
    "answer",
    [
        [5, 6] * 15,  # ha ha ha
        [*([1, 9] * 15), 2],  # 1, 1, 1, ...
        [token for number in range(60) for token in (number, 900)],  # 1, 2, 3, ...
        [token for number in range(30) for token in (800, 801, 802, number, 803)],  # a list of alike lines
        [*range(100, 140)] * 2,  # a sentence said twice
        [0],
    ],
)
def test_lists_and_laughter_are_none(answer: list[int]) -> None:
    assert stopped_after(answer) is None


def test_it_may_be_let_go_on_or_be_stopped_sooner() -> None:
    assert stopped_after([1, 2] * 500, limit=0) is None
    assert stopped_after([1, 2] * 500, limit=1) == 6
    assert stopped_after([1, 2] * 500, limit=100) == 100


@pytest.mark.parametrize("seed", range(20))
def test_repetitions_are_those_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens, limit = list(random.integers(2, size=60)), int(random.integers(1, 12))

    def repeats(tail: list[int]) -> bool:
        sizes = range(1, len(tail) // 3 + 1)
        return any(
            tail[-size * times :] == tail[-size:] * times and size * times + extra >= limit
            for size in sizes
            for times in range(3, len(tail) // size + 1)
            for extra in [_same(tail[: -size * times], tail[-size:])]
        )

    wanted = next((end for end in range(1, len(tokens) + 1) if repeats(tokens[:end])), None)
    assert stopped_after(tokens, limit) == wanted


def _same(before: list[int], phrase: list[int]) -> int:
    """How many tokens at the end of `before` are the end of the phrase: the beginning of the repetition, cut off."""
    number = 0
    while number < min(len(before), len(phrase)) and before[-1 - number] == phrase[-1 - number]:
        number += 1
    return number


@pytest.mark.parametrize(
    ("sampling", "tokens", "reasons"),
    [
        (Sampling(max_new_tokens=3), [1, 2, 3], [None, None, "length"]),
        (Sampling(max_new_tokens=3, stop_token_ids=(2,)), [1, 2], [None, "stop"]),
        (Sampling(max_new_tokens=9, repeat_limit=1), [1, 1, 1], [None, None, "repetition"]),
        (Sampling(max_new_tokens=3, repeat_limit=1), [1, 1, 1], [None, None, "repetition"]),
        (Sampling(max_new_tokens=3, repeat_limit=0), [1, 1, 1], [None, None, "length"]),
        (Sampling(max_new_tokens=4, repeat_limit=1, stop_token_ids=()), [1, 1, 1, 1], [None, None, None, "length"]),
        (Sampling(max_new_tokens=3, repeat_limit=1, stop_token_ids=(1,)), [1], ["stop"]),
    ],
)
def test_why_an_answer_ends(sampling: Sampling, tokens: list[int], reasons: list[str | None]) -> None:
    ending = Ending(sampling)
    assert [ending.push(token) for token in tokens] == reasons
