"""The demo: SmolLM2-135M-Instruct learns clinical coding from three departments, whose rows stay where they are."""
