"""HTML representation of a data set in a notebook.

It shows what a model will see: rows and splits, the distribution of each label, the first images, and the specification
of each feature with its state in the training split. Names and values come from the data, so they are escaped.
"""

import base64
import io
import itertools
from typing import TYPE_CHECKING

import numpy as np

from mlkit._display import render
from mlkit.data.feature_specs import FeatureSpec
from mlkit.data.splits import SPLITS
from mlkit.errors import join_names

if TYPE_CHECKING:
    from mlkit.data.dataset import Dataset

_MAX_FEATURES, _MAX_BARS, _MAX_IMAGES = 24, 12, 12


def render_dataset(
    dataset: "Dataset",  # data set of a table or of images
) -> str:  # HTML
    """Render a data set as HTML."""
    specs = dataset.features.values()
    rows = [(spec.name, spec.type, _describe_spec(spec), "✱" * spec.missing) for spec in specs]
    return render(
        "dataset.html",
        dataset=dataset,
        splits=SPLITS,
        outputs=[(output, _label_bars(output)) for output in dataset.outputs.values()],
        max_bars=_MAX_BARS,
        thumbnails=_thumbnails(dataset.inputs) if isinstance(dataset.inputs, np.ndarray) else None,
        rows=rows,
        max_features=_MAX_FEATURES,
        warnings=[*dataset.warnings, *(["✱ some values are missing"] if any(spec.missing for spec in specs) else [])],
    )


def _label_bars(dataset: "Dataset") -> list[tuple[float, str]]:
    """Length and text of a bar per class, or per bin of a regression target."""
    if dataset.task == "regression":
        counts, edges = np.histogram(dataset.labels, bins=8)
        names = [f"{_format_number(low)} to {_format_number(high)}" for low, high in itertools.pairwise(edges)]
    else:
        counts, names = np.bincount(dataset.labels, minlength=len(dataset.classes)), dataset.classes
    texts = (f"{name}: {n:,} ({n / counts.sum():.1%})" for name, n in zip(names, counts, strict=True))
    return list(zip(counts / counts.max(), texts, strict=True))


def _thumbnails(images: np.ndarray) -> str:
    """The first images as one PNG, in Base64."""
    from matplotlib.image import imsave

    height, width, channels = images.shape[1:]
    images = images[:_MAX_IMAGES]
    pixels = (images - images.min()) / max(float(np.ptp(images)), 1e-9)
    tiles = np.zeros((len(pixels), height, width + max(width // 8, 1), 4))  # the gap between tiles is transparent
    tiles[:, :, :width, :3] = pixels[..., :3] if channels >= 3 else pixels[..., :1]
    tiles[:, :, :width, 3] = 1.0
    buffer = io.BytesIO()
    imsave(buffer, np.concatenate(list(tiles), axis=1), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _describe_spec(spec: FeatureSpec) -> str:
    """Range, vocabulary or hash buckets of a feature."""
    if spec.type == "datetime":
        first, last = (np.datetime64("1970-01-01") + int(day) for day in (spec.minimum, spec.maximum))
        return f"{first} to {last}"
    if spec.buckets:
        return f"{spec.buckets:,} hash buckets"
    if spec.dtype == "string":
        return join_names(spec.vocabulary, 4) if spec.vocabulary else "no value in training"
    span = f"{_format_number(spec.minimum)} to {_format_number(spec.maximum)}"
    if spec.type == "bucket":
        return f"{span}, {len(spec.boundaries) + 1} buckets"
    if spec.type == "image":
        return f"{spec.shape}, {span}"
    return f"{span}, logarithm" if spec.options.normalise == "log" else f"{span}, mean {_format_number(spec.mean)}"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
