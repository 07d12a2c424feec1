import torch

from modeling_edgeglass.captions import hash_captions


def test_equal_real_tokens_hash_equal_whatever_the_padding():
    tokens = torch.tensor([[5, 6, 7]])
    ones, zeros = torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    plain = hash_captions(tokens, ones)
    right = hash_captions(torch.cat([tokens, zeros], 1), torch.cat([ones, zeros], 1))
    left = hash_captions(torch.cat([zeros + 9, tokens], 1), torch.cat([zeros, ones], 1))
    assert plain == right == left


def test_other_tokens_other_order_and_other_length_hash_differently():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (20000, 6), generator=generator).unique(dim=0)
    lengths = torch.randint(0, 7, (len(rows), 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    distinct = torch.cat([rows * mask, lengths], dim=1).unique(dim=0)
    assert len(hash_captions(rows, mask).unique()) == len(distinct)


def test_captions_without_tokens_are_equal():
    mask = torch.zeros(2, 3, dtype=torch.long)
    first, second = hash_captions(torch.tensor([[1, 2, 3], [4, 5, 6]]), mask)
    assert first == second
