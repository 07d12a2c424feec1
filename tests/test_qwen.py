"""The real tokenizer of Qwen3, with its chat template, in front of a tiny Qwen3 with random weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from modeling_edgeglass import EdgeGlassDecodingProcessor
from tests.commands import ROOT
from tests.decoding_runs import make_decoding_trainer, write_decoding_config

TOKENIZER = ROOT / "examples/tokenizers/qwen3"

pytestmark = pytest.mark.skipif(not TOKENIZER.exists(), reason="make examples/tokenizers/qwen3 fetches it with npm")

ASKED = "<|im_start|>user\nSay.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture
def qwen_config(vision_dir: str, text_dir: str, tmp_path: Path) -> Path:
    """A decoding run with this tokenizer."""
    config = write_decoding_config(tmp_path, vision_dir, text_dir)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 8, "intermediate_size": 64, "vocab_size": len(tokenizer), "initializer_range": 0.3}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(2)
    Qwen3ForCausalLM(Qwen3Config(**sizes, **more, **ends)).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    return config


def test_a_prompt_is_a_turn_of_a_chat_and_the_answer_ends_one(qwen_config: Path, tmp_path: Path):
    processor = EdgeGlassDecodingProcessor.from_alignment_pretrained(
        str(tmp_path / "alignment"), str(tmp_path / "language")
    )
    processor.save_pretrained(tmp_path / "kept")
    for each in (processor, EdgeGlassDecodingProcessor.from_pretrained(tmp_path / "kept")):
        assert each.tokenizer.decode(each.prompt_ids("Say.")) == ASKED
        batch = each.encode_answers(["Say.", "What colour is it?"], ["a red dot", "red"])
        for ids, labels, mask, answer in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], ("a red dot", "red"), strict=True
        ):
            assert each.tokenizer.decode(labels[labels != -100]) == f"{answer}<|im_end|>"
            assert each.tokenizer.decode(ids[mask == 1]).endswith(f"</think>\n\n{answer}<|im_end|>")
        prompts = each(text=["Say.", "What colour is it?"])
        assert prompts["attention_mask"][:, -1].tolist() == [1, 1]
        assert each.decode_answers(batch["input_ids"][:, -4:])[1].endswith("red")


def test_training_and_describing_go_through_it(qwen_config: Path):
    train = qwen_config.parent / "train.parquet"
    trainer = make_decoding_trainer(qwen_config, "decoding.language_training=full", "trainer.epochs=40",
                                    f"dataset.val_parquet={train}", "trainer.eval_strategy=no",
                                    "trainer.save_strategy=no", "generation.num_samples=0")  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] > 0.8  # the end of a turn ends an answer, or there would be more words
    assert metrics["eval_other_exact_match"] < 0.2
