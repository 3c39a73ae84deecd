"""The demo's trained weights as a model of PyTorch: thirty matrices, 106 MB."""

import torch

SHAPES = [(1536, 576), (1536, 576), (576, 1536)]


class Weights(torch.nn.Module):
    """Weights that nobody computes with; ``blocks`` blocks of three matrices each."""

    def __init__(self, blocks: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = torch.nn.ParameterList(torch.randn(shape) for _ in range(blocks) for shape in SHAPES)
