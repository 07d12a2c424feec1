"""Figures of an evaluation: the space, the similarities, what is found, and where the pooling looks."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from training.visualization.gallery import Gallery
from training.visualization.style import HEAT, IMAGE, NEUTRAL, TEXT, finish_axes, new_figure, short, wrapped

MAX_MATRIX = 64  # pairs of a similarity matrix


def embedding_space(image_embeds: Tensor, text_embeds: Tensor, method: str = "pca") -> Figure:
    """Pictures and captions in one plane, the two of a pair joined by a line.

    Args:
        image_embeds: Embeddings (N, D); N of 2 or more.
        text_embeds: Embeddings (N, D); text i belongs to image i.
        method: `"pca"`, or `"tsne"` (van der Maaten and Hinton, JMLR 2008).

    Raises:
        ValueError: There are fewer than two pairs, or the method is none of these.
    """
    N = len(image_embeds)
    if N < 2:
        raise ValueError(f"an embedding space needs two pairs or more, got {N}")
    points = torch.cat([image_embeds, text_embeds]).float().numpy()  # (2N, D)
    if method == "pca":
        pca = PCA(n_components=2, svd_solver="full", random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # where all points are one, no variance is explained
            plane = pca.fit_transform(points)
        shares = np.nan_to_num(100 * pca.explained_variance_ratio_)
        xlabel, ylabel = (f"component {i + 1} ({share:.0f} % of the variance)" for i, share in enumerate(shares))
    elif method == "tsne":
        perplexity = min(30.0, (2 * N - 1) / 3)  # scikit-learn wants fewer neighbours than points
        # PCA divides by the spread, and t-SNE crashes on what comes of dividing by zero.
        init = "pca" if N > 2 and np.ptp(points, axis=0).max() > 1e-6 else "random"
        plane = TSNE(perplexity=perplexity, init=init, random_state=0).fit_transform(points)
        xlabel, ylabel = f"t-SNE 1 (perplexity {perplexity:.0f}, no unit)", "t-SNE 2 (no unit)"
    else:
        raise ValueError(f"method must be pca or tsne, got {method!r}")
    images, texts = plane[:N], plane[N:]
    figure = new_figure(7, 6)
    axes = figure.subplots()
    axes.plot(
        np.stack([images[:, 0], texts[:, 0]]), np.stack([images[:, 1], texts[:, 1]]), color=NEUTRAL, lw=0.5, alpha=0.45
    )
    axes.scatter(
        images[:, 0],
        images[:, 1],
        s=22,
        color=IMAGE,
        marker="o",
        label="picture",
        zorder=2,
        edgecolors="white",
        lw=0.4,
    )
    axes.scatter(
        texts[:, 0], texts[:, 1], s=24, color=TEXT, marker="^", label="caption", zorder=2, edgecolors="white", lw=0.4
    )
    finish_axes(axes, f"Embedding space, {N} pairs, each joined by a line", xlabel, ylabel)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def similarity_matrix(image_embeds: Tensor, text_embeds: Tensor, captions: Sequence[str]) -> Figure:
    """Cosines of pictures (rows) and captions (columns); what belongs together lies on the diagonal.

    Args:
        image_embeds: Unit vectors (N, D); the first 64 are drawn.
        text_embeds: Unit vectors (N, D).
        captions: N captions.
    """
    N = min(MAX_MATRIX, len(image_embeds))
    cosines = (image_embeds[:N].float() @ text_embeds[:N].float().T).numpy()
    size = 3 + 0.13 * N  # inches: a label wants its own line
    figure = new_figure(size + 0.8, size)
    axes = figure.subplots()
    drawn = axes.imshow(cosines, cmap=HEAT, interpolation="nearest")
    for i in range(N):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=0.8))
    labels = [short(caption, 24) for caption in captions[:N]]
    font = 9 if N <= 24 else 7
    axes.set_xticks(range(N), labels, rotation=90, fontsize=font)
    axes.set_yticks(range(N), labels, fontsize=font)
    axes.tick_params(length=0)
    axes.set_xlabel("captions")
    axes.set_ylabel("pictures, named by their captions")
    axes.set_title(
        f"Cosines of {N} pictures and captions; pairs lie on the diagonal, outlined", fontsize=11, loc="left"
    )
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="cosine")
    return figure


def retrieval_gallery(
    pictures: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    text_to_image: Gallery,
    image_to_text: Gallery,
) -> Figure:
    """Captions and the five pictures nearest to each, then pictures and the five nearest captions; hits framed.

    Args:
        pictures: RGB pictures (S, S, 3).
        captions: Caption i belongs to picture i.
        text_to_image: Found pictures; its numbers are places in `pictures` and `captions`.
        image_to_text: Found captions.
    """
    rows, columns = text_to_image.found.shape
    heights = [1.45 * rows + 0.3, 1.6 * len(image_to_text.queries) + 0.3]  # inches
    figure = new_figure(9.5, sum(heights))
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    title_top(top, "Captions (random) and the pictures nearest to each; a match is framed")
    grid = top.subplots(rows, columns + 1, squeeze=False, width_ratios=[1.7, *[1] * columns])
    for axes, query, rank in zip(grid[:, 0], text_to_image.queries, text_to_image.ranks, strict=True):
        write_lines(axes, [wrapped(captions[query], 34, 5), f"match at rank {rank:.0f}"], [TEXT, NEUTRAL], [8.5, 7.5])
    for axes_row, found, hits in zip(grid[:, 1:], text_to_image.found, text_to_image.hits, strict=True):
        for axes, index, hit in zip(axes_row, found, hits, strict=True):
            show(axes, pictures[index], hit=bool(hit))
    title_top(bottom, "Pictures (random) and the captions nearest to each; a match is bold")
    grid = bottom.subplots(len(image_to_text.queries), 2, squeeze=False, width_ratios=[1, 5])
    found_captions = zip(
        grid, image_to_text.queries, image_to_text.found, image_to_text.hits, image_to_text.ranks, strict=True
    )
    for (left, right), query, found, hits, rank in found_captions:
        show(left, pictures[query])
        lines = [f"{place + 1}  {short(captions[index], 90)}" for place, index in enumerate(found)]
        colors = [IMAGE if hit else "black" for hit in hits]
        sizes = [8.5] * len(lines)
        weights = ["bold" if hit else "normal" for hit in hits]
        write_lines(right, [*lines, f"match at rank {rank:.0f}"], [*colors, NEUTRAL], [*sizes, 7.5], weights)
    return figure


def attention_map(pictures: Sequence[np.ndarray] | np.ndarray, weights: Tensor) -> Figure:
    """Where the learned pooling looks: each picture, and its tokens' weights beside it.

    Args:
        pictures: RGB pictures (S, S, 3) as the model sees them.
        weights: Weights of the picture's tokens (N, height, width); those of a picture sum to 1, or to less where
            tokens without a place, such as CLS, have the rest.
    """
    relative = (weights * weights[0].numel()).float().numpy()  # 1 is the weight of the mean
    spread = max(0.05, float(np.abs(relative - 1).max()))
    figure = new_figure(1.9 * len(pictures) + 0.8, 4.2)
    grid = figure.subplots(2, len(pictures), squeeze=False)
    for (top, bottom), picture, weight in zip(grid.T, pictures, relative, strict=True):
        show(top, picture)
        show(bottom, weight)
        bottom.images[0].set(cmap=HEAT, clim=(1 - spread, 1 + spread), interpolation="nearest")
    heat = grid[1, -1].images[0]
    bar = figure.colorbar(heat, ax=grid, shrink=0.7, label="weight of a token\n(1: as in the plain mean)")
    bar.ax.set_ylim(bottom=max(0.0, 1 - spread))  # no weight is negative
    title_top(figure, "Pictures as the model sees them, and where its pooling looks")
    return figure


def title_top(figure: FigureBase, title: str) -> None:
    """A title over all axes, at the left as those of single axes."""
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")


def show(axes: Axes, picture: np.ndarray, *, hit: bool = False) -> None:
    """A picture without axes, framed where it is a hit."""
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(hit)
        spine.set_edgecolor(TEXT)
        spine.set_linewidth(3.5)


def write_lines(
    axes: Axes, lines: Sequence[str], colors: Sequence[str], sizes: Sequence[float], weights: Sequence[str] = ()
) -> None:
    """Lines of text in place of a plot, from the top left; a line may hold line breaks."""
    axes.set_axis_off()
    depth = 4.0  # points below the top
    for i, (line, color, size) in enumerate(zip(lines, colors, sizes, strict=True)):
        axes.annotate(
            line,
            (0, 1),
            xytext=(0, -depth),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            color=color,
            fontsize=size,
            fontweight=weights[i] if i < len(weights) else "normal",
        )
        depth += (line.count("\n") + 1) * size * 1.25 + 5
