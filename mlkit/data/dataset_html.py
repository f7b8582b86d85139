"""The HTML representation of a data set in a notebook."""

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlkit.data.feature_specs import FeatureSpec
from mlkit.data.splits import SPLITS
from mlkit.errors import join_names

if TYPE_CHECKING:
    from mlkit.data.dataset import Dataset


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _spec_text(spec: FeatureSpec) -> str:
    """The range or the most frequent values of a feature."""
    if spec.kind == "datetime":
        first, last = (np.datetime64("1970-01-01") + int(day) for day in (spec.minimum, spec.maximum))
        return f"{first} to {last}"
    if spec.buckets:
        return f"{spec.buckets:,} hash buckets"
    if spec.dtype == "string":
        return f"{join_names(spec.vocabulary, 4)}" if spec.vocabulary else "no value in training"
    span = f"{_number(spec.minimum)} to {_number(spec.maximum)}"
    if spec.kind == "bucket":
        return f"{span}, {len(spec.boundaries) + 1} buckets"
    if spec.kind == "image":
        return f"{spec.shape}, {span}"
    return f"{span}, logarithm" if spec.options.normalise == "log" else f"{span}, mean {_number(spec.mean)}"


_BAR = "height:.6em;border-radius:2px;background:currentColor;opacity:.45"


def _bar(share: float, text: str) -> str:
    bar = f'<div style="width:8em"><div style="{_BAR};width:{100 * share:.1f}%"></div></div>'
    return f'<div style="display:flex;align-items:center;gap:.5em">{bar}{html.escape(text)}</div>'


def _row(cells: Iterable[str], tag: str = "td") -> str:
    style = "text-align:left;padding:.15em .9em .15em 0;vertical-align:top;background:none"
    return "<tr>" + "".join(f'<{tag} style="{style}">{cell}</{tag}>' for cell in cells) + "</tr>"


def _thumbnails(images: np.ndarray, count: int = 12) -> str:
    """The first images as one inline picture."""
    import base64
    import io

    from matplotlib.image import imsave

    height, width, channels = images.shape[1:]
    pixels = (images[:count] - images[:count].min()) / max(float(np.ptp(images[:count])), 1e-9)
    tiles = np.zeros((len(pixels), height, width + max(width // 8, 1), 4))  # the gap between tiles stays transparent
    tiles[:, :, :width, :3] = pixels[..., :3] if channels >= 3 else pixels[..., :1]
    tiles[:, :, :width, 3] = 1.0
    buffer = io.BytesIO()
    imsave(buffer, np.concatenate(list(tiles), axis=1), format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="first images" src="data:image/png;base64,{data}" style="height:48px;image-rendering:pixelated"/>'


def _label_bars(dataset: "Dataset") -> str:
    """How often each class occurs, or where the quantities lie."""
    if dataset.task == "regression":
        counts, edges = np.histogram(dataset.labels, bins=8)
        names = [f"{_number(low)} to {_number(high)}" for low, high in itertools.pairwise(edges)]
    else:
        counts, names = np.bincount(dataset.labels, minlength=len(dataset.classes)), dataset.classes
    bars = [
        _bar(n / counts.max(), f"{name}: {n:,} ({n / counts.sum():.1%})") for name, n in zip(names, counts, strict=True)
    ]
    return "".join(bars[:12]) + (f"and {len(bars) - 12} more" if len(bars) > 12 else "")


def _spec_rows(specs: Sequence[FeatureSpec], limit: int = 24) -> str:
    rows = [_row(("feature", "kind", "in training", ""), "th")]
    for spec in specs[:limit]:
        rows.append(_row((html.escape(spec.name), spec.kind, html.escape(_spec_text(spec)), "✱" * spec.missing)))
    if len(specs) > limit:
        rows.append(_row([f"and {len(specs) - limit} more"]))
    return "".join(rows)


def _label_html(dataset: "Dataset") -> str:
    """What is predicted, and how it is spread."""
    bars = f"<div style='columns:18em'>{_label_bars(dataset)}</div>"
    return f"{dataset.task}: <code>{html.escape(dataset.label)}</code>{bars}"


def _dataset_html(dataset: "Dataset") -> str:
    specs = list(dataset.features.values())
    sizes = " · ".join(f"{name} {len(dataset.splits[name]):,}" for name in SPLITS)
    notes = [*dataset.notes, *(["✱ some values are missing"] if any(spec.missing for spec in specs) else [])]
    features = "1 feature" if len(specs) == 1 else f"{len(specs)} features"
    blocks = [
        f"<b>{html.escape(dataset.name)}</b>: {dataset.sizes['all']:,} rows, {features}",
        f"{sizes} <span style='opacity:.7'>({html.escape(dataset.split_rule)})</span>",
        *(_label_html(one) for one in dataset.outputs.values()),
        _thumbnails(dataset.inputs) if isinstance(dataset.inputs, np.ndarray) else "",
        f"<table style='margin:0'>{_spec_rows(specs)}</table>",
        *(f"<span style='opacity:.7'>{html.escape(note)}</span>" for note in notes),
    ]
    return "".join(f"<div style='line-height:1.5;margin:.3em 0'>{block}</div>" for block in blocks if block)
