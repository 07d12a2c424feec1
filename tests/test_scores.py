"""Scores of texts: what is best, what is worst, and what makes no difference."""

import sys

import numpy
import pytest
import torch
import torch.nn.functional as F

from training.decoding.scores import (
    RETRIEVAL_SCORES,
    TEXT_SCORES,
    bootstrap_interval,
    check_scorers,
    exchange,
    score_self_retrieval,
    score_texts,
)
from training.errors import ConfigError

ANSWERS = ["a red dot on a blue box", "two green bars in a row", "one yellow star above the moon"]


def test_the_right_words_score_most_whatever_their_case_and_punctuation():
    scores = score_texts([f"{answer.upper()}!" for answer in ANSWERS], ANSWERS, seed=0)
    assert tuple(scores) == TEXT_SCORES
    assert scores["cider"] == pytest.approx(10) == scores["cider_low"] == scores["cider_high"]
    for name in ("bleu4", "rouge_l", "exact_match"):
        assert scores[name] == pytest.approx(1, abs=1e-6), name


def test_no_common_word_scores_nothing_and_nothing_can_be_said():
    for said in (["nobody knows that"] * 3, [""] * 3):
        scores = score_texts(said, ANSWERS, seed=0)
        assert all(value == pytest.approx(0, abs=1e-3) for value in scores.values()), scores


def test_order_of_pairs_makes_no_difference_and_of_words_it_does():
    said = ["a red box on a blue dot", "two green bars", "the moon"]
    whole = score_texts(said, ANSWERS, seed=0)
    turned = score_texts(said[::-1], ANSWERS[::-1], seed=0)
    for name in ("bleu4", "rouge_l", "cider", "exact_match"):
        assert turned[name] == pytest.approx(whole[name])
    assert score_texts(["dot box a red a on blue", *said[1:]], ANSWERS, seed=0)["bleu4"] < whole["bleu4"]


def test_rare_words_are_worth_more_to_cider_than_words_of_all_answers():
    answers = ["a picture of cats", "a picture of dogs", "a picture of cows"]
    frequent = score_texts(["a picture", "a picture", "a picture"], answers, seed=0)
    rare = score_texts(["cats", "dogs", "cows"], answers, seed=0)
    assert frequent["cider"] == pytest.approx(0)
    assert rare["cider"] > 0.1


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = numpy.random.default_rng(0).normal(3, 2, size=400)
    low, high = bootstrap_interval(values, seed=0)
    assert (low, high) == bootstrap_interval(values, seed=0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("ids", [[7, 5], [1, 2, 3], [4, 4, 4, 9], [*range(30), *range(20)]])
def test_an_exchange_gives_every_picture_the_embedding_of_an_unequal_one(ids: list[int]):
    image_ids = torch.tensor(ids)
    others = exchange(image_ids, seed=1)
    assert (image_ids[others] != image_ids).all()
    assert set(image_ids[others].tolist()) == set(ids)  # each is somebody's
    assert torch.equal(others, exchange(image_ids, seed=1))


def test_an_exact_match_is_the_same_text_but_for_case_spaces_and_punctuation_at_the_ends():
    right = [("Two.", "two"), (" a  red dot", "A red dot!"), ("C++", "c++"), ("-5", "-5")]
    wrong = [("", "🙂"), ("5", "-5"), ("C", "C++"), ("a red dot", "a reddot"), ("", "")]
    for pairs, share in ((right, 1.0), (wrong, 0.0)):
        said, answers = zip(*pairs, strict=True)
        assert score_texts(said, answers, seed=0)["exact_match"] == share


def test_answers_without_a_word_have_no_words_in_common():
    scores = score_texts(["🙂", "a dot"], ["🙂", "!"], seed=0)
    assert scores == dict.fromkeys(TEXT_SCORES, 0.0) | {"exact_match": 0.5}


def test_self_retrieval_counts_the_pictures_that_their_description_finds():
    images = F.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    ids = torch.arange(20)
    perfect = score_self_retrieval(images, images, ids)
    assert perfect == dict.fromkeys(RETRIEVAL_SCORES, 1.0)
    texts = images.clone()
    texts[:5] = -images[:5]  # which are the farthest from their own
    assert score_self_retrieval(texts, images, ids) == {"self_r1": 0.75, "self_r5": 0.75, "self_r10": 0.75}
    twins = torch.cat([images[:1], images[:1], images[2:]])  # the same picture twice is found either way
    assert score_self_retrieval(twins, twins, torch.tensor([0, 0, *range(2, 20)]))["self_r1"] == 1.0


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch):
    check_scorers()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ConfigError, match=r"pip install pycocoevalcap, or set generation\.num_scored=0"):
        check_scorers()
