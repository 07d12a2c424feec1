import math

import evaluate
import pytest
import torch
import torch.nn.functional as F

import training.retrieval
import training.retrieval_metric
from training.retrieval import match_ranks, retrieval_metrics


def pairs(num_pairs: int, dim: int = 8, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_pairs)
    images = torch.randn(num_pairs, dim, generator=generator)
    texts = images + noise * torch.randn(num_pairs, dim, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def naive_metrics(queries: torch.Tensor, gallery: torch.Tensor, match_ids: list[torch.Tensor]) -> dict[str, float]:
    """One query after the other; a match is behind every other item that is as similar."""
    rows = []
    for i in range(len(queries)):
        matches = {j for j in range(len(gallery)) if j == i or any(ids[i] == ids[j] for ids in match_ids)}
        order = sorted(range(len(gallery)), key=lambda j: (-float(queries[i] @ gallery[j]), j in matches))
        ranks = [rank for rank, j in enumerate(order, start=1) if j in matches]
        precision = sum(k / rank for k, rank in enumerate(ranks, start=1)) / len(ranks)
        ideal = sum(1 / math.log2(1 + k) for k in range(1, len(ranks) + 1))
        gain = sum(1 / math.log2(1 + rank) for rank in ranks) / ideal
        rows.append([ranks[0] <= 1, ranks[0] <= 5, ranks[0] <= 10, precision, gain])
    means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    return dict(zip(("r1", "r5", "r10", "map", "ndcg"), means, strict=True))


@pytest.mark.parametrize("num_ids", [30, 7, 2])  # few matches per query, some, and more than are compared one by one
def test_metrics_are_those_of_the_naive_loop_at_every_size(num_ids: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training.retrieval, "TILE", 7)
    monkeypatch.setattr(training.retrieval, "_MANY_MATCHES", 10)
    images, texts = pairs(30)
    match_ids = [torch.arange(30) % num_ids, torch.arange(30) // 2]
    metrics = retrieval_metrics(images, texts, [4, 5, 1], match_ids)
    for suffix, size in (("", 8), ("@5", 5), ("@4", 4), ("@1", 1)):
        prefixes = [F.normalize(embeds[:, :size], dim=-1) for embeds in (images, texts)]
        for way, (queries, gallery) in (("i2t", prefixes), ("t2i", prefixes[::-1])):
            for name, value in naive_metrics(queries, gallery, match_ids).items():
                assert metrics[f"{way}_{name}{suffix}"] == pytest.approx(value), (way, name, suffix)


@pytest.mark.parametrize("tile", [3, 49, 50])
@pytest.mark.parametrize("many_matches", [0, 64])  # sorted, or compared one by one
def test_tiles_change_nothing(tile: int, many_matches: int, monkeypatch: pytest.MonkeyPatch):
    images, texts = pairs(50)
    match_ids = [torch.arange(50) // 3, torch.randint(40, (50,), generator=torch.Generator().manual_seed(0))]
    whole = retrieval_metrics(images, texts, [4, 6], match_ids)
    monkeypatch.setattr(training.retrieval, "TILE", tile)
    monkeypatch.setattr(training.retrieval, "_MANY_MATCHES", many_matches)
    assert retrieval_metrics(images, texts, [4, 6], match_ids) == pytest.approx(whole)


def test_sizes_and_directions_change_nothing_in_each_other():
    images, texts = pairs(30)
    match_ids = [torch.arange(30) // 2]
    together = retrieval_metrics(images, texts, [6, 4], match_ids)
    for size in (6, 4):
        prefixes = [F.normalize(embeds[:, :size], dim=-1) for embeds in (images, texts)]
        alone = retrieval_metrics(*prefixes, [], match_ids)
        assert alone == pytest.approx({name: together[f"{name}@{size}"] for name in alone})
        back = retrieval_metrics(*prefixes[::-1], [], match_ids)
        assert back == pytest.approx({name[2::-1] + name[3:]: value for name, value in alone.items()})


def test_queries_that_are_asked_alone_have_the_same_ranks():
    images, texts = pairs(30)
    match_ids, rows = [torch.arange(30) % 7], torch.tensor([17, 3, 29, 3])
    assert torch.equal(match_ranks(images, texts, match_ids, rows=rows), match_ranks(images, texts, match_ids)[rows])


def test_a_perfect_model_finds_everything_and_order_does_not_matter():
    images, _ = pairs(40)
    assert all(value == 1 for value in retrieval_metrics(images, images, [4]).values())
    images, texts = pairs(40)
    order = torch.randperm(40)
    assert retrieval_metrics(images[order], texts[order], [4]) == pytest.approx(retrieval_metrics(images, texts, [4]))


@pytest.mark.parametrize("tile", [1, 7, 1024])
def test_a_collapsed_model_finds_nothing(tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training.retrieval, "TILE", tile)  # sums of the edges of a matrix are rounded otherwise
    constant = pairs(1, dim=384)[0].expand(20, -1)
    metrics = retrieval_metrics(constant, constant, [256, 128, 16, 1])
    for way in ("i2t", "t2i"):
        for suffix in ("", "@256", "@128", "@16", "@1"):
            assert metrics[f"{way}_r1{suffix}"] == metrics[f"{way}_r10{suffix}"] == 0
            assert metrics[f"{way}_medr{suffix}"] == 20


def test_a_prefix_of_zeros_finds_nothing():
    images, texts = pairs(20)
    images[:, :4] = 0
    metrics = retrieval_metrics(images, texts, [4])
    assert metrics["i2t_medr@4"] == metrics["t2i_medr@4"] == 20


@pytest.mark.parametrize("size", [0, 9, -1, 2.0])
def test_what_is_no_size_is_an_error(size: int):
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1\.\.8"):
        retrieval_metrics(*pairs(10), [size])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_embedding_that_is_no_number_is_an_error(bad: float):
    images, texts = pairs(10)
    texts[3, 2] = bad
    with pytest.raises(ValueError, match="embeddings are NaN or infinite"):
        retrieval_metrics(images, texts, [4])


def test_equal_captions_and_equal_pictures_match_each_other():
    gallery = torch.eye(4)
    queries = gallery[[1, 0, 3, 2]]  # everyone finds the neighbour
    assert match_ranks(queries, gallery)[:, 0].min() > 1
    captions = torch.tensor([5, 5, 6, 7])
    assert match_ranks(queries, gallery, [captions])[:, 0].tolist() == [1, 1, 4, 4]
    pictures = torch.tensor([1, 2, 3, 3])
    assert match_ranks(queries, gallery, [captions, pictures])[:, 0].tolist() == [1, 1, 1, 1]


def test_the_evaluate_module_gives_the_same_numbers():
    images, texts = pairs(30)
    match_ids = [torch.arange(30) % 7]
    metric = evaluate.load(training.retrieval_metric.__file__)
    for start in range(0, 30, 8):
        metric.add_batch(image_embeds=images[start : start + 8].numpy(), text_embeds=texts[start : start + 8].numpy())
    computed = metric.compute(dimensions=[4], match_ids=[ids.tolist() for ids in match_ids])
    assert computed == pytest.approx(retrieval_metrics(images, texts, [4], match_ids))
