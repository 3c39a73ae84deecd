"""The federation's side: ServerApp, round loop, evaluation, report, export."""
