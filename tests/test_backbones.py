"""Any tower: tiny random models of many families, saved, and loaded as the two halves of a pair."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    EfficientNetForImageClassification,
    GPT2Config,
    MobileNetV2Config,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_edgeglass import EdgeGlassModel, TextEncoder, VisionEncoder
from modeling_edgeglass.backbones import has_first_token, hidden_size, load_backbone, longest_text, max_positions
from tests.towers import TINY, tiny_efficientnet

VISION = {"image_size": 64, "patch_size": 16}
TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMPOSITE_TEXT = {**TINY, **TEXT, "max_position_embeddings": 20}


def clip() -> PreTrainedModel:
    return CLIPModel(CLIPConfig(vision_config={**TINY, **VISION}, text_config=COMPOSITE_TEXT))


def siglip() -> PreTrainedModel:
    text_config = COMPOSITE_TEXT | {"projection_size": 32}
    return SiglipModel(SiglipConfig(vision_config={**TINY, **VISION}, text_config=text_config))


def efficientnet() -> PreTrainedModel:
    """Its batch norms see noise once: without statistics the signal fades on the way through random layers."""
    model = EfficientNetForImageClassification(tiny_efficientnet()).train()
    model(pixel_values=torch.randn(8, 3, 64, 64))
    return model.eval()


VISION_MODELS = {
    "clip": clip,
    "siglip": siglip,
    "vit": lambda: ViTForImageClassification(ViTConfig(**TINY, **VISION)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, **VISION)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1])),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    "efficientnet": efficientnet,
}
TEXT_MODELS = {
    "clip": clip,
    "siglip": siglip,
    "bert": lambda: BertForMaskedLM(BertConfig(**TINY, **TEXT, max_position_embeddings=20)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**TINY, vocab_size=99, max_position_embeddings=22)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**TINY, vocab_size=99, max_position_embeddings=22)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**TINY, **TEXT, cls_token_id=1, sep_token_id=2)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, **TEXT, num_key_value_heads=2, head_dim=8)),
}


RELATIVE_POSITIONS = ("modernbert", "t5", "qwen3")  # these may be padded on the left


@pytest.fixture(params=VISION_MODELS)
def vision_backbone(request: pytest.FixtureRequest, tmp_path) -> PreTrainedModel:
    torch.manual_seed(0)
    VISION_MODELS[request.param]().save_pretrained(tmp_path)
    return load_backbone("vision", str(tmp_path))


@pytest.mark.parametrize("use_attention_pooling", [True, False])
def test_any_vision_tower_embeds_pictures(vision_backbone: PreTrainedModel, use_attention_pooling: bool):
    encoder = VisionEncoder(vision_backbone, 48, use_attention_pooling).eval()
    pictures = torch.randn(3, 3, 64, 64)
    embeds = encoder(pictures)
    assert embeds.shape == (3, 48)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(encoder(pictures[1:2]), embeds[1:2])
    assert (embeds[0] - embeds[1]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [32, 48, 96])
def test_pictures_may_have_another_size_than_the_backbone_was_trained_on(vision_backbone: PreTrainedModel, size: int):
    encoder = VisionEncoder(vision_backbone, 48).eval()
    embeds = encoder(torch.randn(2, 3, size, size))
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("use_attention_pooling", [True, False])
@pytest.mark.parametrize(
    ("name", "side"), [*((name, "right") for name in TEXT_MODELS), *((name, "left") for name in RELATIVE_POSITIONS)]
)
def test_any_text_tower_embeds_captions_and_padding_changes_nothing(
    name: str, side: str, use_attention_pooling: bool, tmp_path
):
    torch.manual_seed(0)
    TEXT_MODELS[name]().save_pretrained(tmp_path)
    encoder = TextEncoder(load_backbone("text", str(tmp_path)), 48, use_attention_pooling).eval()
    input_ids = torch.randint(3, 99, (2, 9))
    embeds = encoder(input_ids)
    padding = torch.full((2, 4), encoder.backbone.config.pad_token_id)
    ones, zeros = torch.ones_like(input_ids), torch.zeros_like(padding)
    order = [(padding, zeros), (input_ids, ones)] if side == "left" else [(input_ids, ones), (padding, zeros)]
    padded = encoder(*(torch.cat(parts, dim=1) for parts in zip(*order, strict=True)))
    torch.testing.assert_close(padded, embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    assert (embeds[0] - embeds[1]).abs().max() > 1e-4


@pytest.mark.parametrize("build", [clip, siglip])
def test_halves_of_a_composite_are_the_composites_own(build, tmp_path):
    whole = build().eval()
    whole.save_pretrained(tmp_path)
    pictures, input_ids = torch.randn(2, 3, 64, 64), torch.randint(3, 99, (2, 20))
    vision, text = (load_backbone(modality, str(tmp_path)).eval() for modality in ("vision", "text"))
    expected = whole.vision_model(pixel_values=pictures).last_hidden_state
    assert torch.equal(vision(pixel_values=pictures).last_hidden_state, expected)
    expected = whole.text_model(input_ids=input_ids).last_hidden_state
    assert torch.equal(text(input_ids=input_ids).last_hidden_state, expected)


@pytest.mark.parametrize("pooling_type", ["simple", "statistics"])
def test_a_pair_of_any_towers_survives_saving(pooling_type: str, tmp_path):
    siglip().save_pretrained(tmp_path / "siglip")
    TEXT_MODELS["t5"]().save_pretrained(tmp_path / "t5")
    for vision, text in (("siglip", "siglip"), ("siglip", "t5")):  # T5's embedding is tied to another
        model = EdgeGlassModel.from_vision_text_pretrained(
            str(tmp_path / vision),
            str(tmp_path / text),
            projection_dim=64,
            mrl_dimensions=[16],
            vision_pooling_type=pooling_type,
            text_pooling_type=pooling_type,
        ).eval()
        model.save_pretrained(tmp_path / "pair")
        loaded, report = EdgeGlassModel.from_pretrained(tmp_path / "pair", output_loading_info=True)
        assert not report["missing_keys"]  # load_model refuses a model that lacks any
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "input_ids": torch.randint(3, 99, (2, 20))}
        torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_towers_with_a_token_for_the_whole_are_told_from_those_without(vision_backbone: PreTrainedModel):
    with_token = ("ViTModel", "CLIPVisionModel", "Dinov2Model")
    assert has_first_token(vision_backbone) == (type(vision_backbone).__name__ in with_token)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_texts_begin_with_a_token_for_the_whole_where_models_fill_masks(name: str, tmp_path):
    TEXT_MODELS[name]().save_pretrained(tmp_path)
    found = has_first_token(load_backbone("text", str(tmp_path)))
    assert found == (name in ("bert", "mpnet", "roberta", "modernbert"))


@pytest.mark.parametrize(("name", "positions"), [("bert", 20), ("roberta", 20), ("mpnet", 20), ("clip", 20)])
def test_positions_are_those_that_a_caption_can_use(name: str, positions: int, tmp_path):
    TEXT_MODELS[name]().save_pretrained(tmp_path)
    backbone = load_backbone("text", str(tmp_path)).eval()
    assert max_positions(backbone) == positions
    assert longest_text(backbone.config) == positions
    backbone(input_ids=torch.full((1, positions), 5))  # the longest caption runs


def test_rotary_positions_are_as_many_as_the_config_says_and_relative_ones_endless(tmp_path):
    assert longest_text(Qwen3Config(**TINY, **TEXT, max_position_embeddings=77)) == 77
    assert longest_text(TEXT_MODELS["t5"]().config) is None


def test_a_causal_model_keeps_no_cache(tmp_path):
    TEXT_MODELS["qwen3"]().save_pretrained(tmp_path)
    backbone = load_backbone("text", str(tmp_path))
    assert backbone(input_ids=torch.tensor([[5, 6]])).get("past_key_values") is None


def test_a_missing_tower_names_itself(tmp_path):
    with pytest.raises(
        ValueError, match="vision tower 'no/such' is neither a model directory here nor one on the Hub"
    ):
        load_backbone("vision", "no/such")
    with pytest.raises(ValueError, match="neither a model directory"):
        load_backbone("text", str(tmp_path))


def test_swapped_towers_are_refused(vision_dir: str, text_dir: str):
    with pytest.raises(ValueError, match="BertModel is no vision tower; use a vision model"):
        load_backbone("vision", text_dir)
    with pytest.raises(ValueError, match="ViTModel is no text tower; use a text model"):
        load_backbone("text", vision_dir)


def test_a_checkpoint_without_the_towers_weights_is_refused(tmp_path):
    model = TEXT_MODELS["bert"]()
    model.config.num_hidden_layers = 3  # one more than there are weights for
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint lacks 16 weights of BertModel, such as encoder\.layer\.2"):
        load_backbone("text", str(tmp_path))


def test_a_model_without_tokens_is_refused_with_those_that_work():
    encoder = TextEncoder(TEXT_MODELS["bert"](), 48)  # a masked language model gives logits alone
    with pytest.raises(ValueError, match=r"BertForMaskedLM returns no last_hidden_state; use .*BERT, MPNet, RoBERTa"):
        encoder(torch.randint(3, 99, (2, 5)))


def test_a_width_other_than_the_configs_is_an_error():
    backbone = VISION_MODELS["resnet"]()
    backbone.config.hidden_sizes = [8, 17]
    with pytest.raises(ValueError, match=r"shape \(2, 4, 16\), where its config says that they are 17 wide"):
        VisionEncoder(backbone, 48)(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("config_class", [CLIPConfig, MobileNetV2Config])
def test_a_config_that_tells_no_width_is_an_error_with_the_towers_that_work(config_class):
    message = rf"{config_class.__name__} tells no token width: .*; use a vision model .*DINOv2.*; or a text model"
    with pytest.raises(ValueError, match=message):
        hidden_size(config_class())


def test_gpt2_positions_are_found():
    from modeling_edgeglass.backbones import build_backbone

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=24, vocab_size=99)
    assert max_positions(build_backbone("text", config)) == 24
