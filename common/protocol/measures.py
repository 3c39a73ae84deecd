"""The numbers in messages, by group: names, meanings, allowed values, and when each stays at the site."""

from common.metrics import SCORES
from common.protocol.fields import Measure, Stays
from common.protocol.kinds import AMOUNT, LOSS, POSITIVE, share

WITHOUT_SCORES: Stays = "without scores"
WITH_PRIVACY: Stays = "with privacy"

#: Numbers of a round's training, all without their prefix.
TRAINING = {
    "loss": Measure("mean training loss", LOSS, WITHOUT_SCORES),
    "loss_first": Measure("training loss of the first step", LOSS, WITHOUT_SCORES),
    "loss_last": Measure("training loss of the last step", LOSS, WITHOUT_SCORES),
    "steps": Measure("optimizer steps", AMOUNT),
    "learning_rate": Measure("learning rate of the last step", AMOUNT),
    "wire_error": Measure("relative rounding error of the factors", share(0.0)),
    "tokens": Measure("input tokens, or images, that were trained on", AMOUNT, WITH_PRIVACY),
    "seconds": Measure("seconds in the training loop", AMOUNT, WITH_PRIVACY),
    "peak_memory_bytes": Measure("peak memory of the GPU", AMOUNT, WITH_PRIVACY),
    "micro_batch": Measure("rows per forward pass", AMOUNT, WITH_PRIVACY),
    "rows_left_out": Measure("images left out, because they cannot be read", AMOUNT, WITH_PRIVACY),
    "clipped": Measure("numbers clipped to the bounds of a masked sum", AMOUNT, WITH_PRIVACY),
}
#: Numbers of an evaluation on the site's held-out rows.
EVALUATED = {
    name: Measure(f"{score.in_text} on held-out rows", share(score.least) if score.bounded else LOSS, WITHOUT_SCORES)
    for name, score in SCORES.items()
} | {
    "examples": Measure("held-out rows that were evaluated", AMOUNT, WITHOUT_SCORES),
    "tokens": Measure("tokens of their answers", AMOUNT, WITHOUT_SCORES),
    "generated": Measure("held-out rows that were answered by generation", AMOUNT, WITHOUT_SCORES),
}
SECONDS = {
    "load": Measure("seconds to load the base model", AMOUNT, WITH_PRIVACY),
    "train": Measure("seconds to train", AMOUNT, WITH_PRIVACY),
    "evaluate": Measure("seconds to evaluate", AMOUNT, WITH_PRIVACY),
}
CLOCK = {
    "started": Measure("when the site began with the message, by its clock", POSITIVE),
    "finished": Measure("when it was done, by its clock", POSITIVE, WITH_PRIVACY),
}
