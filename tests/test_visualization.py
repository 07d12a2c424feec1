import errno
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_hex
from PIL import Image

from tests.conftest import png
from tests.runs import make_trainer
from training.checkpoints import newest_checkpoint
from training.errors import DataError
from training.history import HistoryFiles, history_rows, read_history
from training.results import save_metrics
from training.visualization import (
    TrainingVisualizer,
    caption_lengths,
    draw_run,
    find_nearest,
    load_sample,
    model_parts,
    pairs_grid,
    sample_evaluation,
    save_sample,
)
from training.visualization import visualizer as visualizer_module
from training.visualization.style import IMAGE, TEXT, running_mean, short, wrapped

ROOT = Path(__file__).parents[1]
FROM_HISTORY = {"training_curves.png", "loss_components.png", "lr_schedule.png"}
FROM_EVALUATION = {
    "embedding_space.png",
    "similarity_matrix.png",
    "mrl_performance.png",
    "retrieval_gallery.png",
    "attention_map.png",
}


def history(steps: int, *, nan: bool = False) -> list[dict[str, float]]:
    rows = [
        {"loss": math.nan if nan and step % 3 == 0 else 3 / step, "loss_clip": 1.0, "loss_mrl": 2.0,
         "learning_rate": 0.1 / step, "step": step}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    return [*rows, {"eval_loss": 2.0, "eval_i2t_r1": 0.5, "eval_t2i_r1": 0.25, "eval_i2t_r1@8": 0.4,
                    "eval_t2i_r1@8": 0.25, "step": steps}]  # fmt: skip


def unit_vectors(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def draw(tmp_path: Path) -> TrainingVisualizer:
    return TrainingVisualizer(tmp_path / "plots")


def line_values(figure, axes: int, label: str) -> list[float]:
    (line,) = (line for line in figure.axes[axes].lines if line.get_label().startswith(label))
    return line.get_ydata().tolist()


def test_curves_show_what_was_logged_and_are_saved(draw: TrainingVisualizer):
    figure = draw.plot_training_curves(history(4))
    assert line_values(figure, 0, "train") == [3, 1.5, 1, 0.75]
    assert line_values(figure, 0, "val") == [2.0]
    assert line_values(figure, 1, "image to text") == [50.0]
    assert line_values(draw.plot_loss_components(history(4)), 0, "CLIP") == [1.0] * 4
    rates = line_values(draw.plot_lr_schedule(history(4)), 0, "learning rate")
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    assert {path.name for path in draw.save_dir.iterdir()} == FROM_HISTORY
    for path in draw.save_dir.iterdir():
        assert Image.open(path).size > (300, 300)


def test_every_axis_has_a_name_and_colors_have_one_meaning(draw: TrainingVisualizer):
    images, texts = unit_vectors(6), unit_vectors(6, seed=1)
    figures = [
        draw.plot_training_curves(history(4)),
        draw.plot_loss_components(history(4)),
        draw.plot_lr_schedule(history(4)),
        draw.plot_mrl_performance(history(4), 16),
        draw.plot_embedding_space(images, texts),
        draw.plot_similarity_matrix(images, texts, list("abcdef")),
    ]
    for figure in figures:
        for axes in figure.axes:
            assert axes.get_ylabel() or axes.get_subplotspec().get_gridspec().ncols > 1  # a shared axis is named once
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>"
    recall, space = figures[0].axes[1], figures[4].axes[0]
    assert [to_hex(line.get_color()).upper() for line in recall.lines] == [IMAGE, TEXT]
    assert [to_hex(points.get_facecolor()[0]).upper() for points in space.collections] == [IMAGE, TEXT]


def test_matryoshka_performance_writes_the_kept_share_at_each_size(draw: TrainingVisualizer):
    figure = draw.plot_mrl_performance(history(2), full_dimension=16)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16"]
    assert [text.get_text() for text in axes.texts] == ["80 %", "100 %", "100 %", "100 %"]
    one_evaluation = {"eval_i2t_r1": 0.0, "eval_t2i_r1": 0.0, "eval_i2t_r1@8": 0.0, "eval_t2i_r1@8": 0.0}
    assert draw.plot_mrl_performance(one_evaluation, 16).axes[0].texts[0].get_text() == "none"  # of nothing no share


def test_a_history_of_one_step_or_with_nan_is_drawn(draw: TrainingVisualizer):
    for rows in (history(1), history(1)[:1], history(7, nan=True), history(500, nan=True)):
        draw.plot_training_curves(rows)
        draw.plot_loss_components(rows)
        draw.plot_lr_schedule(rows)
    rates = line_values(draw.plot_lr_schedule(history(500)), 0, "learning rate")
    assert rates == pytest.approx([0.1 / step for step in range(1, 501)])  # exact: it is not noise
    figure = draw.plot_training_curves(history(7, nan=True))
    assert np.isnan(line_values(figure, 0, "train")[2])
    assert figure.axes[0].get_legend().get_texts()[0].get_text().endswith("(2 not finite)")


def test_an_empty_history_is_an_error_that_says_so(draw: TrainingVisualizer):
    for plot in (draw.plot_training_curves, draw.plot_loss_components, draw.plot_lr_schedule):
        with pytest.raises(ValueError, match="the history has no train/"):
            plot([])
    with pytest.raises(ValueError, match="no val/i2t_r1"):
        draw.plot_mrl_performance(history(3)[:3])


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("num_pairs", [2, 3, 40])
def test_pairs_are_joined_in_the_plane(draw: TrainingVisualizer, method: str, num_pairs: int):
    (axes,) = draw.plot_embedding_space(unit_vectors(num_pairs), unit_vectors(num_pairs, seed=1), method).axes
    images, texts = (points.get_offsets() for points in axes.collections)
    assert len(axes.lines) == num_pairs
    for line, image, text in zip(axes.lines, images, texts, strict=True):
        assert np.allclose(line.get_xydata(), [image, text])


def test_the_space_of_a_collapsed_model_and_of_one_pair(draw: TrainingVisualizer):
    for method in ("pca", "tsne"):
        draw.plot_embedding_space(torch.ones(5, 8), torch.ones(5, 8), method)
    with pytest.raises(ValueError, match="needs two pairs or more, got 1"):
        draw.plot_embedding_space(torch.ones(1, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match="method must be pca or tsne"):
        draw.plot_embedding_space(torch.ones(5, 8), torch.ones(5, 8), "umap")


def test_a_similarity_matrix_has_at_most_64_pairs_and_short_labels(draw: TrainingVisualizer):
    images, texts = unit_vectors(70), unit_vectors(70, seed=1)
    captions = ["$x_1$ a very long caption, \x00 with a NUL and 100 %"] * 70
    axes = draw.plot_similarity_matrix(images, texts, captions).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), (images[:64] @ texts[:64].T).numpy(), rtol=1e-5)
    assert {len(label.get_text().replace("\\", "")) for label in axes.get_xticklabels()} == {24}


def test_short_captions_are_one_line_and_no_formula():
    assert short("a\n\tb\x00\x1b c", 20) == "a b c"
    assert short("costs $5 or $6", 20) == r"costs \$5 or \$6"
    assert short("abcdef", 4) == "abc…"
    assert wrapped("長" * 30, 8, 2) == "長" * 8 + "\n" + "長" * 7 + "…"
    assert wrapped("$ab $cd", 4, 2) == "\\$ab\n\\$cd"


def test_a_running_mean_passes_over_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, 8.0])
    np.testing.assert_allclose(running_mean(values, 1), [1.0, 2.0, 5.5, 5.5])
    np.testing.assert_allclose(running_mean(values, 0), values)


def test_a_gallery_is_what_sorting_by_hand_gives():
    images, texts = unit_vectors(30), unit_vectors(30, seed=1)
    captions = torch.arange(30) // 2  # pairs of equal captions
    gallery = find_nearest(torch.tensor([3, 17]), texts, images, [captions])
    for query, found, hits, rank in zip(gallery.queries, gallery.found, gallery.hits, gallery.ranks, strict=True):
        order = sorted(range(30), key=lambda i, query=query: -float(texts[query] @ images[i]))
        assert found.tolist() == order[:5]
        assert hits.tolist() == [captions[i] == captions[query] for i in order[:5]]
        assert rank == 1 + min(place for place, i in enumerate(order) if captions[i] == captions[query])
    assert find_nearest(torch.tensor([0]), texts[:2], images[:2]).found.shape == (1, 2)


@pytest.mark.parametrize("pooling", ["simple", "multihead"])
def test_a_sample_comes_back_as_it_was_saved_and_is_what_the_model_says(
    run_config: Path, tmp_path: Path, pooling: str
):
    trainer = make_trainer(run_config, f"vision_encoder.pooling_type={pooling}")
    metrics = trainer.evaluate()
    sample = sample_evaluation(trainer.encoded, metrics, trainer.model, step=7, seed=1)
    save_sample(sample, tmp_path)
    loaded = load_sample(tmp_path)
    assert loaded.step == 7
    assert loaded.metrics["val/i2t_r1@16"] == metrics["eval_i2t_r1@16"]
    assert loaded.captions == sample.captions
    for name in ("image_embeds", "text_embeds", "pictures", "attended", "attention"):
        assert torch.equal(getattr(loaded, name), getattr(sample, name))
    assert torch.equal(loaded.text_to_image.found, sample.text_to_image.found)

    captions = [trainer.eval_dataset.pairs[i].caption for i in range(10)]
    rows = [captions.index(caption) for caption in loaded.captions]
    assert sorted(rows) == list(range(10))
    torch.testing.assert_close(loaded.image_embeds, trainer.encoded.image_embeds[rows].half())
    query = captions.index(loaded.picture_captions[loaded.text_to_image.queries[0]])
    nearest = (trainer.encoded.text_embeds[query] @ trainer.encoded.image_embeds.T).argmax()
    assert loaded.picture_captions[loaded.text_to_image.found[0, 0]] == captions[nearest]
    torch.testing.assert_close(loaded.attention.sum(dim=(1, 2)) < 1, torch.ones(6, dtype=torch.bool))  # CLS has a part
    assert (sample_evaluation(trainer.encoded, metrics, trainer.model, step=7, seed=1).captions
            == sample.captions)  # fmt: skip


def test_a_damaged_sample_is_one_line_and_none_is_none(tmp_path: Path):
    assert load_sample(tmp_path) is None
    (tmp_path / "evaluation_sample.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(DataError, match="is damaged"):
        load_sample(tmp_path)


def test_a_run_leaves_every_figure_and_they_can_be_drawn_again_from_the_files_alone(run_config: Path):
    trainer = make_trainer(run_config, visualize=True)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    files = FROM_HISTORY | FROM_EVALUATION | {"report.html", "metrics.csv", "training_history.json"}
    assert files <= {path.name for path in folder.iterdir()}
    for name in FROM_HISTORY | FROM_EVALUATION | {"report.html"}:
        (folder / name).unlink()
    (run_config.parent / "val.parquet").unlink()
    command = [sys.executable, "-m", "training.visualization", str(folder), "--method", "tsne"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files <= {path.name for path in folder.iterdir()}
    assert not Gcf.figs  # pyplot has been told of none


def test_a_directory_without_a_run_is_one_line(tmp_path: Path):
    command = [sys.executable, "-m", "training.visualization", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"error: {tmp_path}/training_history.json: cannot be read")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_figure_that_fails_is_one_warning_and_training_goes_on(run_config: Path, monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise RuntimeError("no colour left")

    monkeypatch.setattr(visualizer_module.embeddings, "similarity_matrix", fail)
    trainer = make_trainer(run_config, visualize=True)
    trainer.train()
    assert trainer.state.global_step == 10
    warnings = [record.getMessage() for record in caplog.records if "could be drawn" in record.getMessage()]
    assert len(warnings) == 1
    assert "similarity_matrix: RuntimeError: no colour left" in warnings[0]
    names = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    assert FROM_HISTORY | FROM_EVALUATION - {"similarity_matrix.png"} <= names
    assert "similarity_matrix.png" not in names


def test_a_sample_that_fails_costs_its_figures_alone(run_config: Path, monkeypatch, caplog):
    monkeypatch.setattr("training.callbacks.sample_evaluation", lambda *args, **kwargs: 1 / 0)
    trainer = make_trainer(run_config, visualize=True)
    trainer.train()
    assert trainer.state.global_step == 10
    assert caplog.text.count("evaluation sample: ZeroDivisionError") == 1
    names = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    assert names >= FROM_HISTORY | {"report.html"}
    assert not names & (FROM_EVALUATION | {"evaluation_sample.safetensors"})


def test_tokens_without_places_cost_the_attention_map_alone(run_config: Path, monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise ValueError("the 17 tokens lie on no grid")

    trainer = make_trainer(run_config, visualize=True)
    monkeypatch.setattr(trainer.model.vision_encoder, "attention_map", fail)
    trainer.evaluate()
    sample = sample_evaluation(trainer.encoded, {}, trainer.model, step=0, seed=0)
    assert len(sample.attention) == len(sample.attended) == 0
    assert len(sample.pictures) > 0


def test_pictures_as_thin_as_a_line_and_two_pairs_can_be_shown(run_config: Path):
    rows = [{"image_bytes": png(Image.new("RGB", size, "red")), "caption": str(size)} for size in ((900, 1), (1, 900))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), run_config.parent / "val.parquet")
    trainer = make_trainer(run_config, "vision_encoder.use_attention_pooling=false")
    metrics = trainer.evaluate()
    sample = sample_evaluation(trainer.encoded, metrics, trainer.model, step=0, seed=0)
    HistoryFiles(trainer.args.output_dir).write([])
    save_sample(sample, trainer.args.output_dir)
    assert draw_run(trainer.args.output_dir) == {}
    names = {path.name for path in Path(trainer.args.output_dir).glob("*.png")}
    assert names == FROM_EVALUATION - {"attention_map.png"}
    thin = sample.pictures[sample.picture_captions.index("(900, 1)")]
    assert (thin == torch.tensor([255, 0, 0])).all(dim=-1).sum() == 128  # one line of red


def test_another_set_is_no_matter_of_the_run(run_config: Path):
    trainer = make_trainer(run_config, visualize=True)
    trainer.train()
    before = load_sample(trainer.args.output_dir)
    trainer.evaluate(make_trainer(run_config).eval_dataset, metric_key_prefix="test")
    assert load_sample(trainer.args.output_dir).metrics == before.metrics


def test_figures_after_the_end_are_of_the_model_that_was_saved(run_config: Path):
    trainer = make_trainer(run_config, "trainer.eval_strategy=no", visualize=True)
    trainer.train()
    metrics = trainer.evaluate()
    sample = load_sample(trainer.args.output_dir)
    assert {name: sample.metrics[f"val/{name}"] for name in ("i2t_r1", "t2i_r1@32")} == {
        name: metrics[f"eval_{name}"] for name in ("i2t_r1", "t2i_r1@32")
    }
    assert (Path(trainer.args.output_dir) / "mrl_performance.png").exists()


def test_a_history_that_cannot_be_written_is_one_warning_and_is_whole_after_the_next_session(
    run_config: Path, monkeypatch, caplog
):
    def fail(self: HistoryFiles, row: dict[str, float]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HistoryFiles, "add", fail)
        make_trainer(run_config).train()
    assert caplog.text.count("end here ([Errno 28] No space left on device)") == 1
    longer = make_trainer(run_config, "trainer.epochs=3")
    longer.train(resume_from_checkpoint=newest_checkpoint(longer.args.output_dir))
    assert [row["train/step"] for row in read_history(longer.args.output_dir)] == list(range(1, 16))


def test_drawing_changes_no_weight(run_config: Path):
    drawn, plain = (make_trainer(run_config, visualize=visualize) for visualize in (True, False))
    drawn.train()
    (run_config.parent / "run").rename(run_config.parent / "drawn")
    plain.train()
    for name, value in drawn.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name


def test_the_report_holds_everything_and_asks_no_network(tmp_path: Path):
    HistoryFiles(tmp_path).write([])
    draw_run(tmp_path)  # before the first log
    recalls = {f"eval_{way}_r{k}{size}": 0.25 for way in ("i2t", "t2i") for k in (1, 5, 10) for size in ("", "@8")}
    HistoryFiles(tmp_path).write(history_rows([*history(3), {"step": 3, **recalls}]))
    (tmp_path / "config.yaml").write_text("dataset:\n  train_parquet: '<script>alert(1)</script>'\n")
    command = "accelerate launch run_alignment.py --config x.yaml"
    environment = {"command": command, "accelerators": ["none"], "packages": {"torch": "2.13.0"}}
    save_metrics(environment, tmp_path / "environment.json")
    save_metrics({f"val/{name.removeprefix('eval_')}": 0.5 for name in recalls}, tmp_path / "final_metrics.json")
    assert draw_run(tmp_path) == {}
    html = (tmp_path / "report.html").read_text()
    assert command in html
    assert "<td>8</td><td>50.0</td>" in html  # of the model that was saved, not of the last step
    assert "<td>100 %</td>" in html
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert html.count("data:image/png;base64,") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)


def test_overviews_show_pairs_lengths_and_what_trains(model):
    pictures = [Image.new("RGB", (size, 20), "red") for size in range(10, 17)]
    grid = pairs_grid(pictures, [f"caption {i}" for i in range(7)], columns=4)
    assert [axes.get_xlabel() for axes in grid.axes if axes.axison] == [f"caption {i}" for i in range(7)]
    assert "cut at 9: 2 of them" in caption_lengths([3, 4, 10, 11], 9).axes[0].get_title(loc="left")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained / 1e6:.1f} of" in model_parts(model).axes[0].get_title(loc="left")
