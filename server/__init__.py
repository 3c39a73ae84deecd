"""The server's side: ServerApp, round loop, evaluation, report, export."""
