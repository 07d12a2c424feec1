"""Where training starts: `optimization.init: spectral` solves both projections in one pass over the pairs."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from modeling_edgeglass import EdgeGlassModel
from modeling_edgeglass.distributed import rank, world_size
from modeling_edgeglass.encoders import TextEncoder, VisionEncoder
from modeling_edgeglass.modeling_edgeglass import MAX_LOGIT_SCALE
from training.config import AlignmentConfig
from training.data import PixmoParquetImageTextDataset
from training.errors import DataError, UserError, told_by_each_rank
from training.moments import Moments
from training.randomness import keyed_rng
from training.recovery import RecoverableTrainer
from training.signals import heed_parent_alone
from training.spectral import AffineMap, NoVarianceError, Setting, SpectralSolver
from training.spectral_search import POWERS, RIDGES, Grid, HeldOutPairs, SettingSearch

FEWEST_PAIRS = 32

_BATCH_SIZE = 64  # of the pass
_HELD_OUT_SHARE, _HELD_OUT_PAIRS = 0.25, 1000  # at most
_SPARE_ENERGY = 1e-4  # of an embedding in the rows that no direction is left for
_LOGIT_SCALES = [MAX_LOGIT_SCALE ** (i / 30) for i in range(31)]


@dataclass(frozen=True)
class SpectralStart:
    """What the closed form found.

    Args:
        setting: Given or chosen.
        num_pairs: Of which the projections were solved.
        num_held_out: Of these, the pairs that the setting was chosen by, before they were taken in.
        num_directions: Canonical directions.
        num_carrying: Directions that correlate on held-out pairs beyond two standard errors of chance.
        logit_scale: The best one on the held-out pairs, as a factor.
    """

    setting: Setting
    num_pairs: int
    num_held_out: int
    num_directions: int
    num_carrying: int
    logit_scale: float

    def describe(self, sizes: Sequence[int]) -> str:
        """In one line, with the smallest of `sizes` that holds all directions that carry anything."""
        (ridge_x, ridge_y), power = self.setting.ridge, self.setting.power
        longest = min((size for size in sizes if size >= self.num_carrying), default=None)
        repeats = f"embeddings longer than {longest} repeat it" if longest else "all sizes tell something"
        return (
            f"spectral start of {self.num_pairs} pairs: ridge {ridge_x:g} / {ridge_y:g}, power {power:g}; "
            f"{self.num_carrying} of {self.num_directions} directions carry something on {self.num_held_out} pairs "
            f"held out: {repeats}"
        )


def initialize(config: AlignmentConfig, trainer: RecoverableTrainer) -> None:
    """Put the closed form into the projections and `logit_scale` of `trainer.model`, if the config says so.

    Pooling is at its start. Every rank passes over its share of the training pairs, without text dropout; rank 0
    solves.

    Raises:
        DataError: There are too few pairs, or all features of one side are the same.
        Interrupted: Some rank got a signal.
    """
    if config.optimization.init != "spectral":
        return
    model = cast(EdgeGlassModel, trainer.model)
    passed = _Pass(config, trainer)
    with told_by_each_rank():
        passed.run()
    moments, held_out = passed.gather()
    error: UserError | None = None
    if rank() == 0:
        try:
            start = start_spectrally(config, model, moments, held_out)
            tqdm.write(start.describe([*model.config.mrl_dimensions, model.config.projection_dim]))
        except UserError as raised:
            error = raised
    if trainer.agree(error is not None)[0]:
        raise error or DataError("rank 0 could not solve for the start")
    if world_size() > 1:
        for value in (*_projections(model), model.logit_scale):
            dist.broadcast(value.data, src=0)


def start_spectrally(
    config: AlignmentConfig, model: EdgeGlassModel, moments: Moments, held_out: HeldOutPairs
) -> SpectralStart:
    """Choose the setting, solve, and write the projections and `logit_scale` of a model."""
    num_pairs, num_held_out = moments.count + len(held_out.x), len(held_out.x)
    if num_pairs < FEWEST_PAIRS:
        raise DataError(
            f"dataset.train_parquet: {num_pairs} pairs are too few for optimization.init=spectral, which wants "
            f"{FEWEST_PAIRS} or more; set optimization.init=random"
        )
    if not (moments.is_finite() and held_out.x.isfinite().all() and held_out.y.isfinite().all()):
        raise DataError("a tower gives features that are NaN or infinite; set trainer.bf16 and trainer.fp16 to false")
    if len(held_out.caption_ids.unique()) < 2 or moments.count < 2:
        raise DataError(
            "dataset.train_parquet: the captions are nearly all the same, so that there is nothing to align"
        )
    sizes = [*model.config.mrl_dimensions, model.config.projection_dim]
    grid = _grid(config, model)
    try:
        search = SettingSearch(moments, held_out, sizes, grid)
        setting = search.best()
        image_embeds, text_embeds = search.embed(setting)
        logit_scale = _best_logit_scale(model, image_embeds, text_embeds, held_out.caption_ids)
        solver = SpectralSolver(moments.and_rows(held_out.x, held_out.y))
        image_map, text_map = solver.solve(setting)
    except NoVarianceError as error:
        raise DataError(
            f"dataset.train_parquet: the tower gives the same features for every {error}, so that there is nothing "
            "to align"
        ) from error
    seed = keyed_rng(config.trainer["seed"], "spare rows").getrandbits(63)
    generator = torch.Generator().manual_seed(seed)
    _write(model.vision_encoder.projection, image_map, generator)
    _write(model.text_encoder.projection, text_map, generator)
    model.logit_scale.data.fill_(math.log(logit_scale))
    return SpectralStart(
        setting=setting,
        num_pairs=num_pairs,
        num_held_out=num_held_out,
        num_directions=len(image_map.weight),
        num_carrying=_count_correlated(image_embeds, text_embeds),
        logit_scale=logit_scale,
    )


class _Pass(Dataset[dict[str, Any]]):
    """One pass of this rank over its share of the training pairs, in as many views as are kept."""

    def __init__(self, config: AlignmentConfig, trainer: RecoverableTrainer) -> None:
        self.config, self.trainer = config, trainer
        self.model = cast(EdgeGlassModel, trainer.model)
        self.dataset: PixmoParquetImageTextDataset = copy.copy(cast(Any, trainer.train_dataset))
        self.dataset.text_dropout_prob = 0.0
        self.moments = Moments(self.model.vision_encoder.pooled_size, self.model.text_encoder.pooled_size)
        self.held_out: list[tuple[int, Tensor, Tensor, int]] = []

    def __len__(self) -> int:
        return len(self.dataset) * max(1, self.config.dataset.cache_views)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.dataset[divmod(number, len(self.dataset))]

    def run(self) -> None:
        """Encode, pool, and add up."""
        trainer, model = self.trainer, self.model
        starts = range(rank() * _BATCH_SIZE, len(self), world_size() * _BATCH_SIZE)
        batches = [range(start, min(start + _BATCH_SIZE, len(self))) for start in starts]
        loader: Any = DataLoader(
            self,
            batch_sampler=cast(Any, batches),
            collate_fn=trainer.data_collator,
            num_workers=trainer.args.dataloader_num_workers,
            worker_init_fn=partial(heed_parent_alone, then=None),
        )
        model.eval()
        trainer._move_model_to_device(model, trainer.args.device)
        is_shown = rank() == 0 and not trainer.args.disable_tqdm
        bar = tqdm(batches, desc="pass for the spectral start", disable=not is_shown)
        # The batches first: a rank without any more still agrees with the others.
        for batch, numbers in zip(trainer.agreed_batches(loader), bar, strict=True):
            images, texts = self._pool(trainer._prepare_inputs(batch))
            self._take(numbers, images, texts, batch["token_hashes"].tolist())

    @torch.no_grad()
    def _pool(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Pooled pictures and captions of a batch."""
        vision, text = self.model.vision_encoder, self.model.text_encoder
        image_features, text_features = batch.get("image_features"), batch.get("text_features")
        attention_mask = batch.get("attention_mask")
        with self.trainer.accelerator.autocast():
            if image_features is None:
                image_features = vision.features(batch["pixel_values"])
            if text_features is None:
                text_features, attention_mask = text.features(batch["input_ids"], attention_mask)
            images, texts = vision.pool(image_features), text.pool(text_features, attention_mask)
        return images.float().cpu(), texts.float().cpu()

    def _take(self, numbers: range, images: Tensor, texts: Tensor, token_hashes: list[int]) -> None:
        """Hold pairs out by their caption, in one view; add up the others."""
        is_held_out = [self._holds_out(caption) for caption in token_hashes]
        for place, number in enumerate(numbers):
            if is_held_out[place] and number < len(self.dataset):
                self.held_out.append((number, images[place], texts[place], token_hashes[place]))
        added = ~torch.tensor(is_held_out)
        self.moments.add(images[added], texts[added])

    def _holds_out(self, caption: int) -> bool:
        share = min(_HELD_OUT_SHARE, _HELD_OUT_PAIRS / len(self.dataset))
        return keyed_rng(self.config.trainer["seed"], caption, "held out").random() < share

    def gather(self) -> tuple[Moments, HeldOutPairs]:
        """What all ranks found, on every rank; in the order of the pairs, whatever the ranks."""
        moments = self.moments.merge_ranks(self.trainer.args.device)
        found = sorted(gather_object(self.held_out), key=lambda pair: pair[0])
        images = torch.stack([image for _, image, _, _ in found]) if found else torch.empty(0, moments.size_x)
        texts = torch.stack([text for _, _, text, _ in found]) if found else torch.empty(0, moments.size_y)
        return moments, HeldOutPairs(images, texts, torch.tensor([caption for *_, caption in found]))


def _grid(config: AlignmentConfig, model: EdgeGlassModel) -> Grid:
    """The settings that a config leaves open. Of statistics pooling the mean alone is one of them."""
    ridge, power = config.optimization.spectral_ridge, config.optimization.spectral_power
    ridges_x, ridges_y = (RIDGES, RIDGES) if ridge == "auto" else ([float(ridge[0])], [float(ridge[1])])
    powers = POWERS if power == "auto" else [float(power)]
    return Grid(_columns(model.vision_encoder), _columns(model.text_encoder), ridges_x, ridges_y, powers)


def _columns(encoder: VisionEncoder | TextEncoder) -> list[int]:
    return sorted({encoder.hidden_size, encoder.pooled_size})


@torch.no_grad()
def _best_logit_scale(model: EdgeGlassModel, image_embeds: Tensor, text_embeds: Tensor, caption_ids: Tensor) -> float:
    """1 / temperature in 1..100 under which the loss of embeddings (N, K) is smallest, over all sizes."""
    missing = max(0, model.config.projection_dim - image_embeds.shape[1])
    images, texts = nn.functional.pad(image_embeds, (0, missing)), nn.functional.pad(text_embeds, (0, missing))
    alignment_loss = model.alignment_loss.eval()

    def loss(logit_scale: float) -> float:
        scale = torch.tensor(logit_scale)
        return float(
            alignment_loss(images, texts, logit_scale=scale, caption_ids=caption_ids, gather_negatives=False).loss
        )

    return min(_LOGIT_SCALES, key=loss)


def _count_correlated(x: Tensor, y: Tensor) -> int:
    """Columns of x and y (N, K) whose correlation is more than two standard errors above none."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    lengths = (x.norm(dim=0) * y.norm(dim=0)).clamp_min(torch.finfo(x.dtype).tiny)
    return int(((x * y).sum(dim=0) / lengths > 2 / len(x) ** 0.5).sum())


def _projections(model: EdgeGlassModel) -> list[Tensor]:
    return [*model.vision_encoder.projection.parameters(), *model.text_encoder.projection.parameters()]


@torch.no_grad()
def _write(projection: nn.Linear, solved: AffineMap, generator: torch.Generator) -> None:
    """Put a solution into the first rows of a projection, and little into the others.

    Rows without a direction start random, with a share of `_SPARE_ENERGY` of an embedding together: zeros on both
    sides would have no gradient. The whole has the size of a new layer's weights, so that rates mean the same.
    """
    size, width = projection.weight.shape
    rows, columns = min(size, len(solved.weight)), solved.weight.shape[1]
    weight = torch.zeros(size, width, dtype=torch.float64)
    weight[:rows, :columns] = solved.weight[:rows]
    if rows < size:
        spare = torch.randn(size - rows, columns, generator=generator, dtype=torch.float64)
        weight[rows:, :columns] = spare * (_SPARE_ENERGY * solved.energy / ((size - rows) * solved.variance)) ** 0.5
    weight *= (size / weight.square().sum()) ** 0.5
    projection.weight.copy_(weight)
    projection.bias.copy_(-weight[:, :columns] @ solved.mean)
