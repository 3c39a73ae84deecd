"""What both sides must agree on: configuration, errors, wire format, models, tasks, low-rank algebra."""
