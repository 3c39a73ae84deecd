"""The strategies as Flower knows them: messages, and Flower's Strategy interface."""
