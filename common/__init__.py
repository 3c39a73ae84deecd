"""Code that server and sites share: configuration, errors, wire format, models, tasks, low-rank algebra."""
