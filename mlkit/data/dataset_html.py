"""HTML representation of a data set in a notebook.

It shows what a model will see: rows and splits, the distribution of each label, the first images, and the specification
of each feature with its state in the training split. Names and values come from the data, so they are escaped.
"""

import base64
import html
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlkit.data.feature_specs import FeatureSpec
from mlkit.data.splits import SPLITS
from mlkit.errors import join_names

if TYPE_CHECKING:
    from mlkit.data.dataset import Dataset

_MAX_FEATURES, _MAX_BARS, _MAX_IMAGES = 24, 12, 12
_BAR_STYLE = "height:.6em;border-radius:2px;background:currentColor;opacity:.45"
_CELL_STYLE = "text-align:left;padding:.15em .9em .15em 0;vertical-align:top;background:none"


def render_dataset(
    dataset: "Dataset",  # data set of a table or of images
) -> str:  # HTML
    """Render a data set as HTML."""
    specs = list(dataset.features.values())
    sizes = " · ".join(f"{name} {len(dataset.splits[name]):,}" for name in SPLITS)
    notes = [*dataset.notes, *(["✱ some values are missing"] if any(spec.missing for spec in specs) else [])]
    features = "1 feature" if len(specs) == 1 else f"{len(specs)} features"
    blocks = [
        f"<b>{html.escape(dataset.name)}</b>: {dataset.sizes['all']:,} rows, {features}",
        f"{sizes} <span style='opacity:.7'>({html.escape(dataset.split_rule)})</span>",
        *(_label_html(output) for output in dataset.outputs.values()),
        _thumbnails(dataset.inputs) if isinstance(dataset.inputs, np.ndarray) else "",
        f"<table style='margin:0'>{_feature_rows(specs)}</table>",
        *(f"<span style='opacity:.7'>{html.escape(note)}</span>" for note in notes),
    ]
    return "".join(f"<div style='line-height:1.5;margin:.3em 0'>{block}</div>" for block in blocks if block)


def _label_html(dataset: "Dataset") -> str:
    """Task and distribution of a label."""
    bars = f"<div style='columns:18em'>{_label_bars(dataset)}</div>"
    return f"{dataset.task}: <code>{html.escape(dataset.label)}</code>{bars}"


def _label_bars(dataset: "Dataset") -> str:
    """Rows per class, or a histogram of a regression target."""
    if dataset.task == "regression":
        counts, edges = np.histogram(dataset.labels, bins=8)
        names = [f"{_format_number(low)} to {_format_number(high)}" for low, high in itertools.pairwise(edges)]
    else:
        counts, names = np.bincount(dataset.labels, minlength=len(dataset.classes)), dataset.classes
    bars = [
        _bar(n / counts.max(), f"{name}: {n:,} ({n / counts.sum():.1%})") for name, n in zip(names, counts, strict=True)
    ]
    return "".join(bars[:_MAX_BARS]) + (f"and {len(bars) - _MAX_BARS} more" if len(bars) > _MAX_BARS else "")


def _bar(share: float, text: str) -> str:
    bar = f'<div style="width:8em"><div style="{_BAR_STYLE};width:{100 * share:.1f}%"></div></div>'
    return f'<div style="display:flex;align-items:center;gap:.5em">{bar}{html.escape(text)}</div>'


def _thumbnails(images: np.ndarray) -> str:
    """The first images as one inline PNG."""
    from matplotlib.image import imsave

    height, width, channels = images.shape[1:]
    images = images[:_MAX_IMAGES]
    pixels = (images - images.min()) / max(float(np.ptp(images)), 1e-9)
    tiles = np.zeros((len(pixels), height, width + max(width // 8, 1), 4))  # the gap between tiles is transparent
    tiles[:, :, :width, :3] = pixels[..., :3] if channels >= 3 else pixels[..., :1]
    tiles[:, :, :width, 3] = 1.0
    buffer = io.BytesIO()
    imsave(buffer, np.concatenate(list(tiles), axis=1), format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="first images" src="data:image/png;base64,{data}" style="height:48px;image-rendering:pixelated"/>'


def _feature_rows(specs: Sequence[FeatureSpec]) -> str:
    rows = [_row(("feature", "kind", "in training", ""), "th")]
    for spec in specs[:_MAX_FEATURES]:
        rows.append(_row((html.escape(spec.name), spec.kind, html.escape(_describe_spec(spec)), "✱" * spec.missing)))
    if len(specs) > _MAX_FEATURES:
        rows.append(_row([f"and {len(specs) - _MAX_FEATURES} more"]))
    return "".join(rows)


def _row(cells: Iterable[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f'<{tag} style="{_CELL_STYLE}">{cell}</{tag}>' for cell in cells) + "</tr>"


def _describe_spec(spec: FeatureSpec) -> str:
    """Range, vocabulary or hash buckets of a feature."""
    if spec.kind == "datetime":
        first, last = (np.datetime64("1970-01-01") + int(day) for day in (spec.minimum, spec.maximum))
        return f"{first} to {last}"
    if spec.buckets:
        return f"{spec.buckets:,} hash buckets"
    if spec.dtype == "string":
        return join_names(spec.vocabulary, 4) if spec.vocabulary else "no value in training"
    span = f"{_format_number(spec.minimum)} to {_format_number(spec.maximum)}"
    if spec.kind == "bucket":
        return f"{span}, {len(spec.boundaries) + 1} buckets"
    if spec.kind == "image":
        return f"{spec.shape}, {span}"
    return f"{span}, logarithm" if spec.options.normalise == "log" else f"{span}, mean {_format_number(spec.mean)}"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
