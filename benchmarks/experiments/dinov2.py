"""DINOv2-small (arXiv 2304.07193) out of an ONNX file that holds it as its backbone, as a transformers folder."""

from pathlib import Path

import numpy as np
import torch

from common.errors import DataError

_PREFIX = "backbone."
_SIZE = 56  # pixels; 16 patches of 14 x 14, which a processor handles in a tenth of the time of 224 x 224


def convert(file: Path, folder: Path) -> None:
    """Write the backbone in ``file`` to ``folder``, with an image processor for small images.

    The exporter kept the parameters' names, except for matrices: matrices are transposed, and only the nodes that
    multiply by them have their names. The position embeddings come in two parts: class token, and 37 x 37 patches.

    Raises:
        DataError: the file holds another model.
    """
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    found = {name: torch.from_numpy(np.array(values)) for name, values in _weights(file).items()}
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    model = Dinov2Model(config)
    found["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pre-training only
    # transformers renames attention's layers when it loads a folder, so the names here are those of the hub's files.
    theirs = {_hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != theirs:
        wrong = sorted(theirs.keys() ^ found.keys()) or ["their shapes differ"]
        raise DataError(f"{file} holds no DINOv2-small: {len(wrong)} tensors differ, e.g. {wrong[0]}")
    model.load_state_dict({name: found[_hub_name(name)] for name in model.state_dict()})
    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": _SIZE, "width": _SIZE}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ).save_pretrained(folder)


def _weights(file: Path) -> dict[str, np.ndarray]:
    """All parameters of the backbone, under the names of the hub's files."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix(_PREFIX): array for name, array in stored.items() if name.startswith(_PREFIX)}
    positions = []
    for node in graph.node:
        path = node.name.removeprefix("/").replace("/", ".")
        if not path.startswith(_PREFIX):
            continue
        held = [stored[name] for name in node.input if name in stored and not name.startswith(_PREFIX)]
        if node.op_type == "MatMul" and held:
            weights[f"{path.removeprefix(_PREFIX).removesuffix('.MatMul')}.weight"] = held[0].T
        elif path.startswith(f"{_PREFIX}embeddings."):
            positions += [array for array in held if array.ndim == 3]
    positions.sort(key=lambda array: array.shape[1])  # the class token's first
    if positions:
        weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return weights


def _hub_name(name: str) -> str:
    """The name that a parameter of transformers' model has in the hub's files."""
    for own, theirs in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")):
        name = name.replace(f"attention.{own}.", f"attention.{theirs}.")
    return name.replace("attention.o_proj.", "attention.output.dense.")
