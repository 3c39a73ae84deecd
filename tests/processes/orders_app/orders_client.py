"""A client that does what it is told: to answer, to fail, to die."""

import os
import sys
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
answered = 0


@app.query()
def obey(message: Message, context: Context) -> Message:
    global answered
    order = str(message.content.config_records["config"]["order"])
    seen = int(context.state.config_records.get("seen", ConfigRecord({"messages": 0}))["messages"])  # type: ignore[arg-type]
    context.state.config_records["seen"] = ConfigRecord({"messages": seen + 1})
    answered += 1
    if order == "die":
        os._exit(3)
    if order == "fail":
        raise ValueError("a row of a private shard")
    if order.startswith("sleep"):
        time.sleep(float(order.partition(" ")[2]))
    facts = {"pid": os.getpid(), "answered": answered, "seen": seen + 1, "worker": os.environ.get("FEDSPAN_WORKER", "")}
    facts |= {"bundle": os.environ.get("FEDSPAN_BUNDLE", ""), "vetted": os.environ.get("FEDSPAN_VETTED", "")}
    facts["installed"] = [name for name in ("client", "common", "server") if name in sys.modules]
    return Message(RecordDict({"config": ConfigRecord(facts)}), reply_to=message)
