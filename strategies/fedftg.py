"""FedFTG: clients train the lower blocks' MLP weights with GaLore, the server averages the weights directly.

Source: arXiv 2410.23111, section 3. W <- sum_k p_k W_k over the trained tensors, accumulated in float32.
"""

from typing import ClassVar, Literal

from strategies.rule import Averaging


class FedFTGRule(Averaging):
    """Direct averaging of base weights; how the clients train them is theirs."""

    trains: ClassVar[Literal["weights", "lora"]] = "weights"
