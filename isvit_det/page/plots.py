"""Plots of the report, as SVG that takes the page's colours."""
import io
import re
from typing import Any, Dict, List, Mapping, Tuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from isvit_det.report.layer_file import LayerRecord, SiteRecord

# Stands for the colour of the page's text, which is another in the dark.
TEXT = '#010203'
# Colours that are told apart by all, on light and on dark ground.
COLORS = ('#8a8f98', '#1f7ae0', '#e0731f', '#2f9e63', '#b04ad8', '#c9a400')
STYLE: Dict[Any, Any] = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'isvit_det',
    'font.family': 'sans-serif',
    'font.size': 9.,
    'text.color': TEXT,
    'axes.edgecolor': TEXT,
    'axes.labelcolor': TEXT,
    'xtick.color': TEXT,
    'ytick.color': TEXT,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': .6,
    'legend.frameon': False,
    # A name may have a dollar sign.
    'text.parse_math': False,
}


def _svg(figure: Figure, title: str) -> Markup:
    """A figure as an element of a page, which says its title aloud."""
    stream = io.StringIO()
    figure.savefig(
        stream,
        format='svg',
        transparent=True,
        metadata={
            'Date': None,
            'Creator': None
        })
    text = stream.getvalue()
    text = text[text.index('<svg'):].replace(TEXT, 'currentColor')
    # Metadata is of no use, and styles would be those of the whole page.
    text = re.sub(r'<(metadata|style).*?</\1>', '', text, flags=re.DOTALL)
    # The page gives the font.
    text = re.sub(r'font-family: [^;"]*(; )?', '', text)
    text = re.sub(r'font: ([\d.]+px)[^;"]*', r'font-size: \1', text)
    start = Markup('<svg role="img" aria-label="{}"').format(title)
    return start + Markup(text[len('<svg'):])


def _axes(width: float, height: float, count: int = 1) -> Tuple[Figure, list]:
    figure = Figure(figsize=(width, height))
    # matplotlib's own layouts take half of the time of a report.
    left, right, bottom, top = .55, .08, .42, .1
    figure.subplots_adjust(
        left / width,
        bottom / height,
        1 - right / width,
        1 - top / height,
        wspace=.75 / (width / count - .75))
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def by_threshold(
        curves: Mapping[str, Tuple[np.ndarray, np.ndarray]]) -> Markup:
    """AP in points over the IoU that a detection must have.

    Args:
        curves: thresholds and APs as fractions, by model.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes, ) = _axes(4.2, 2.7)
        for color, (name, (places, values)) in zip(COLORS, curves.items()):
            axes.plot(
                places,
                100 * np.asarray(values),
                marker='o',
                markersize=2.5,
                linewidth=1.4,
                color=color,
                label=name)
        axes.set(xlabel='least IoU', ylabel='AP', ylim=(0, None))
        axes.legend()
        return _svg(figure, 'AP by IoU')


def precision_recall(curves: Mapping[str, Mapping[str, np.ndarray]]) -> Markup:
    """Precision over recall at IoU .50 (solid) and .75 (dashed).

    Args:
        curves: precision at 101 values of recall, by model and IoU.
    """
    lines = {'0.50': '-', '0.75': '--', '0.90': ':'}
    recall = np.linspace(0, 1, 101)
    with matplotlib.rc_context(STYLE):
        figure, (axes, ) = _axes(4.2, 2.7)
        for color, (name, by_iou) in zip(COLORS, curves.items()):
            for iou, values in by_iou.items():
                axes.plot(
                    recall,
                    values,
                    lines.get(iou, '-'),
                    color=color,
                    linewidth=1.3,
                    label=f'{name}, IoU {iou}')
        axes.set(
            xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(fontsize=7)
        return _svg(figure, 'precision by recall')


def layer(record: LayerRecord) -> Markup:
    """Histograms of what a layer quantizes, with the codes over them."""
    has_weights = len(record.weight_counts) > 0
    count = len(record.sites) + has_weights
    with matplotlib.rc_context(STYLE):
        figure, every = _axes(3.1 * count, 1.9, count)
        for axes, site in zip(every, record.sites):
            _site(axes, site)
        if has_weights:
            _weights(every[-1], record)
        return _svg(figure, f'values and codes of {record.name}')


def _site(axes: matplotlib.axes.Axes, site: SiteRecord) -> None:
    counts, levels = site.counts, site.levels
    edges = np.linspace(site.low, site.high, len(counts) + 1)
    if site.is_log:
        # Large attention stands at the right.
        edges = -edges[::-1]
        counts = counts[::-1]
        with np.errstate(divide='ignore'):
            levels = np.log2(np.maximum(levels, 2.**-30))
        levels = np.maximum(levels, edges[0])
    heights = counts / max(counts.sum(), 1)
    axes.stairs(heights, edges, fill=True, color='#1f7ae0', alpha=.45)
    if len(levels) <= 64:
        axes.vlines(
            levels,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color='#e0731f',
            linewidth=.6)
    else:
        axes.axvspan(levels.min(), levels.max(), color='#e0731f', alpha=.1)
    if _is_steep(heights):
        axes.set_yscale('log')
        # The own one needs mathematical text, which STYLE forbids.
        axes.yaxis.set_major_formatter(lambda value, place: f'{value:g}')
    axes.set(
        xlabel='log2 of attention' if site.is_log else f'{site.place}',
        ylabel='share')


def _weights(axes: matplotlib.axes.Axes, record: LayerRecord) -> None:
    counts = record.weight_counts
    num = len(record.code_counts)
    edges = np.linspace(-.5, num - .5, len(counts) + 1)
    axes.stairs(
        counts / max(counts.sum(), 1) * len(counts) / num,
        edges,
        fill=True,
        color='#1f7ae0',
        alpha=.45)
    axes.stairs(
        record.code_counts / max(record.code_counts.sum(), 1),
        np.arange(num + 1) - .5,
        color='#e0731f',
        linewidth=.9)
    axes.set(xlabel='weights, in codes', ylabel='share')


def _is_steep(heights: np.ndarray) -> bool:
    """Whether a few bins have nearly all."""
    kept: List[float] = sorted(heights.tolist())
    return kept[-1] > .5
