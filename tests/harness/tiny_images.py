"""A tiny random ViT, folders of coloured images and the files of a federation on them."""

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel, ViTConfig, ViTImageProcessor, ViTModel

from deploy.sandbox.tiny import OF_FEW_ROWS

COLORS = {"blue": (30, 40, 200), "green": (30, 190, 60), "red": (210, 40, 30)}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def make_vision_model(folder: Path, family: str = "vit") -> Path:
    """Write a random vision model without a head, with its image processor, to ``folder``."""
    mlp = {"intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "vit":
            model: Any = ViTModel(ViTConfig(**SIZES, **mlp, initializer_range=0.2), add_pooling_layer=False)
        elif family == "dinov2":
            model = Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, initializer_range=0.2))
        else:
            text = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **mlp}
            model = SiglipModel(SiglipConfig(vision_config={**SIZES, **mlp}, text_config=text))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def make_images(folder: Path, each: int, seed: int) -> Path:
    """A sub-folder per color with ``each`` noisy images in it."""
    generator = random.Random(seed)
    for label, color in COLORS.items():
        (folder / label).mkdir(parents=True)
        for number in range(each):
            image = Image.new("RGB", (20, 20))
            noisy = [tuple(c + generator.randint(-25, 25) for c in color) for _ in range(400)]
            image.putdata(noisy)
            image.save(folder / label / f"{number}.png")
    return folder


def make_image_federation(folder: Path, sizes: dict[str, int], family: str = "vit", **changes: Any) -> Path:
    """Model, images (``sizes`` of each color), site files and a federation file; return the federation file."""
    make_vision_model(folder / "model", family)
    for seed, (site, each) in enumerate(sizes.items()):
        make_images(folder / site, each, seed)
        data = {"path": site, "prompt": "image", "answer": "label", "held_out": 0.25}
        (folder / f"{site}.yaml").write_text(yaml.safe_dump({"name": site, "data": data, "policy": OF_FEW_ROWS}))
    make_images(folder / "server", 4, 99)
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": "model"},
        "task": {"type": "image-classification", "labels": list(COLORS)},
        "strategy": {"name": "rolora", "modules": "linear", "rank": 2, "head": "train"},
        "rounds": 2,
        "cohort": {"min_clients": len(sizes), "join_deadline": 120.0, "round_deadline": 120.0},
        "training": {"learning_rate": 0.02, "local_steps": 10, "batch_size": 6},
        "evaluation": {"server": {"path": "server", "prompt": "image", "answer": "label"}},
        "local": {"sites": [f"{site}.yaml" for site in sizes]},
        **changes,
    }
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
