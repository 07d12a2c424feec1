"""How near descriptions are to what should have been said."""

import re
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from training.errors import ConfigError
from training.retrieval import RECALL_KS, match_ranks

TEXT_SCORES = ("bleu4", "rouge_l", "cider", "cider_low", "cider_high", "exact_match")
RETRIEVAL_SCORES = tuple(f"self_r{k}" for k in RECALL_KS)

_RESAMPLES = 2000  # of the bootstrap


def check_scorers() -> None:
    """Find out before anything is trained whether texts can be scored.

    Raises:
        ConfigError: pycocoevalcap is not installed.
    """
    try:
        import pycocoevalcap.cider.cider  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "descriptions are scored by pycocoevalcap: pip install pycocoevalcap, or set generation.num_scored=0"
        ) from error


def score_texts(texts: Sequence[str], answers: Sequence[str], seed: int) -> dict[str, float]:
    """BLEU-4, ROUGE-L, CIDEr and exact match of texts, each against one answer.

    The first three are those of pycocoevalcap, as in papers on captions, but for the splitting into words, which there
    is a Java program's: here words are runs of letters and digits in lower case.

    Args:
        texts: What was said (N,).
        answers: What should have been said (N,).
        seed: Of the bootstrap.

    Returns:
        `bleu4` (Papineni et al. 2002, of the whole set; next to nothing where answers have less than four words),
        `rouge_l` (Lin 2004) and `exact_match` (but for case and punctuation at the ends), means in 0..1;
        `cider` (arXiv:1411.5726), a mean in 0..10, whose inverse document frequencies are those of `answers`;
        `cider_low` and `cider_high`, ends of its 95 % interval by bootstrap over the pairs.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    matches = [bare(text) == bare(answer) != "" for text, answer in zip(texts, answers, strict=True)]
    scores = dict.fromkeys(TEXT_SCORES, 0.0) | {"exact_match": sum(matches) / len(matches)}
    results, references = (
        {i: [" ".join(words(text))] for i, text in enumerate(column)} for column in (texts, answers)
    )
    if not any(text for (text,) in references.values()):  # answers in emoji alone, which have no words to count
        return scores
    bleu, _ = Bleu(4).compute_score(references, results, verbose=0)
    rouge, _ = Rouge().compute_score(references, results)
    cider, each = Cider().compute_score(references, results)
    low, high = bootstrap_interval(numpy.asarray(each), seed)
    return scores | {
        "bleu4": float(bleu[3]),
        "rouge_l": float(rouge),
        "cider": float(cider),
        "cider_low": low,
        "cider_high": high,
    }


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def bare(text: str) -> str:
    """Without case, spare spaces, and punctuation at its ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def bootstrap_interval(values: numpy.ndarray, seed: int) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of values (N,): percentiles of the means of samples drawn from them."""
    rng = numpy.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def score_self_retrieval(text_embeds: Tensor, image_embeds: Tensor, image_ids: Tensor) -> dict[str, float]:
    """Share of descriptions that, embedded again, find the picture that they describe among the first K, 0..1.

    Args:
        text_embeds: Unit vectors (N, D) of the descriptions.
        image_embeds: Unit vectors (N, D) of the pictures.
        image_ids: Equal for equal pictures (N,).
    """
    ranks = match_ranks(text_embeds, image_embeds, [image_ids])[:, 0]
    return {f"self_r{k}": (ranks <= k).double().mean().item() for k in RECALL_KS}


def exchange(image_ids: Tensor, seed: int) -> Tensor:
    """For each picture the number of another one (N,), which is never an equal one.

    Args:
        image_ids: Equal for equal pictures (N,), two different ones at least.
        seed: Of the draw.
    """
    distinct, places = image_ids.unique(return_inverse=True)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    first = torch.empty_like(order)
    first[places.flip(0)] = torch.arange(len(image_ids)).flip(0)
    return first[others[places]]
