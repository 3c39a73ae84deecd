"""Gives orders to the only living node, one after another, and writes down what came back."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """``orders`` separated by commas; the answers go to ``out`` as they come."""
    answers = []
    for order in str(context.run_config["orders"]).split(","):
        if order.startswith("until"):
            while not Path(order.partition(" ")[2]).exists():
                time.sleep(0.2)
            continue
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.2)
        # A node that was killed counts as connected for a minute: all are asked, the one that lives answers.
        config = ConfigRecord({"order": order})
        if file := context.run_config["signatures"]:
            config["bundle-signatures"] = Path(str(file)).read_text()
        content = RecordDict({"config": config})
        sent = list(grid.push_messages([Message(content, node, MessageType.QUERY) for node in nodes]))
        while not (replies := [r for r in grid.pull_messages(sent) if not (r.has_error() and r.error.code in GONE)]):
            time.sleep(0.2)
        (reply,) = replies
        if reply.has_error():
            answers.append({"error": reply.error.reason, "code": reply.error.code})
        else:
            answers.append(dict(reply.content.config_records["config"]))
        out = Path(str(context.run_config["out"]))
        new = out.with_suffix(".new")
        new.write_text(json.dumps(answers))
        new.replace(out)  # the test reads it meanwhile
