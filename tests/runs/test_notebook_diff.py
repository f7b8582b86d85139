"""Normalization of notebook outputs: volatile parts are ignored, everything else is compared."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlkit.runs.notebook_diff import execution_days, image_digest, normalize_outputs, normalize_text

from .test_compare import code, displayed

DAYS = execution_days({"metadata": {"papermill": {"start_time": "2026-11-21T01:58:09+00:00"}}})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("took 8.3 s", "took 12 s"),
        ("took 2 min 05 s", "took 3 min 59 s"),
        ("3 h 12 min", "4 h 01 min"),
        ("at 2026-11-21T01:58:09.12Z", "at 2026-11-22 09:00"),
        ("<A at 0x7f3b5c2e1d50>", "<A at 0x7f99aaaa1d50>"),
        ("Cell In[3], line 1", "Cell In[14], line 1"),
        ("/a/runs/20261121-015807-train-t3ny/x.png", "/other/20261122-115807-train-aaaa/x.png"),
        ("saved in /tmp/tmpab12cd34/x", "saved in /tmp/tmpzz99zz99/x"),
        ("to saved_model/.writing-9fbuqi25/assets", "to saved_model/.writing-5kr8e49u/assets"),
        ("1,234.5 rows/s", "99 rows/s"),
        ("\x1b[1mbold\x1b[0m", "bold"),
        (
            "10%| [00:01<00:09, 9it/s]\r100%| [00:10<00:00, 9it/s]",
            "50%| [00:05<00:05, 8it/s]\r100%| [00:11<00:00, 8it/s]",
        ),
    ],
)
def test_volatile_parts_are_ignored(first: str, second: str) -> None:
    assert normalize_text(first, DAYS) == normalize_text(second, DAYS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("loss 0.1", "loss 0.2"),
        ("first row 2019-03-04 10:00:00", "first row 2019-03-04 10:00:01"),
        ("mean 0.5 min 0.1", "mean 0.6 min 0.1"),
        ("count 10 min 0.1", "count 11 min 0.1"),
        ("x[10:20]", "x[10:30]"),
        ("color 0xff0000", "color 0x00ff00"),
        ("753ad7c05fba105a", "853ad7c05fba105a"),
        ("20 epochs", "21 epochs"),
        ("at 2019-03-04", "at 2019-03-05"),  # not a day of the execution
    ],
)
def test_results_are_compared(first: str, second: str) -> None:
    assert normalize_text(first, DAYS) != normalize_text(second, DAYS)


def test_every_iso_date_is_ignored_when_the_day_of_execution_is_unknown() -> None:
    assert normalize_text("at 2019-03-04") == "at «date»"


def test_a_run_folder_with_spaces_is_ignored() -> None:
    folder = "/my runs/20261121-015807-train-t3ny"
    assert normalize_text(f"{folder}/x", folder=folder) == "«run»/x"


def test_a_progress_bar_is_compared_by_its_last_state() -> None:
    bar = "10%| [00:01<00:09, 9it/s]\r100%| [00:10<00:00, 9it/s]"
    assert normalize_text(bar) == "100%| «rate»"


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(bytes(range(256)) * 8000).decode(),
        "0123456789" * 200_000,
        "/a/b" * 500_000,
        "\n".join(["12 rows 3.5 s"] * 100_000),
        "1:" * 500_000,
    ],
    ids=("base64", "digits", "path", "lines", "colons"),
)
def test_large_outputs_are_normalized_quickly(text: str) -> None:
    normalize_text(text)  # a pattern with catastrophic backtracking would take hours


@pytest.mark.parametrize(
    "output",
    [
        {},
        {"output_type": "stream"},
        displayed("image/png", "not base64"),
        displayed("text/plain", None),
        {"output_type": "error"},
    ],
)
def test_invalid_outputs_are_compared_anyway(output: dict[str, Any]) -> None:
    assert normalize_outputs(code("x", output)) == normalize_outputs(code("x", output))


def png(image: Image.Image, **options: Any) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_images_are_compared_by_their_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), "uint8")
    image, metadata = Image.fromarray(pixels), PngInfo()
    metadata.add_text("Author", "Anna")
    assert image_digest(png(image)) == image_digest(png(image, pnginfo=metadata, compress_level=1))
    pixels[3, 4, 2] ^= 1
    assert image_digest(png(image)) != image_digest(png(Image.fromarray(pixels)))
    assert image_digest(png(image)) != image_digest(png(image.transpose(Image.Transpose.ROTATE_90)))


def test_a_palette_does_not_change_an_image() -> None:
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    assert image_digest(png(image)) == image_digest(png(image.convert("P", palette=Image.Palette.ADAPTIVE)))


def test_images_of_16_bits_are_compared_in_full_precision() -> None:
    first, second = (Image.fromarray(np.full((4, 4), value, "uint16")) for value in (1000, 1001))
    assert image_digest(png(first)) != image_digest(png(second))


@pytest.mark.parametrize("size", [0, 8, 40, 90])
def test_damaged_images_are_compared_by_their_bytes(size: int) -> None:
    data = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), "uint8")))[:size]
    assert image_digest(data) == image_digest(bytes(data))
    assert image_digest(data) != image_digest(data + b"x")
