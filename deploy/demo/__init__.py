"""The demo: SmolLM2-135M-Instruct learns clinical coding from three departments that keep their rows."""
