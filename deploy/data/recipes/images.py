"""Images: a folder with Training and Testing (the brain tumour MRI set of Kaggle), and MNIST from its package."""

from pathlib import Path

from common.data.shards import Cells, load_cells
from common.errors import DataError
from deploy.data.recipes.splits import Splits


def brain_tumour(source: Path) -> Splits:
    """``Training/<class>/*.jpg`` and ``Testing/<class>/*.jpg``.

    Columns: image (absolute path) and label (the class: glioma, meningioma, notumor, pituitary).

    Raises:
        DataError: a folder is missing or has no images; or the two hold other classes.
    """
    parts: list[list[Cells]] = []
    for name in ("Training", "Testing"):
        if not (source / name).is_dir():
            raise DataError(f"{source} holds no folder {name}; expected Training and Testing with a folder per class")
        parts.append(load_cells((source / name).resolve())[1])
    labels = [{row["label"] for row in part} for part in parts]
    if labels[0] != labels[1]:
        raise DataError(f"classes differ: Training has {sorted(labels[0])}, Testing has {sorted(labels[1])}")
    return Splits(parts[0], parts[1])
