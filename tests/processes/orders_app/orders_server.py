"""Gives orders to the only node, one after another, and writes down what came back."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """``orders`` separated by commas; the answers go to ``out`` as they come."""
    answers = []
    for order in str(context.run_config["orders"]).split(","):
        if order.startswith("pause"):
            time.sleep(float(order.partition(" ")[2]))
            continue
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.2)
        content = RecordDict({"config": ConfigRecord({"order": order})})
        (sent,) = grid.push_messages([Message(content, nodes[-1], MessageType.QUERY)])
        while not (replies := list(grid.pull_messages([sent]))):
            time.sleep(0.2)
        (reply,) = replies
        if reply.has_error():
            answers.append({"error": reply.error.reason, "code": reply.error.code})
        else:
            answers.append(dict(reply.content.config_records["config"]))
        Path(str(context.run_config["out"])).write_text(json.dumps(answers))
