"""The strategies for Flower: messages, and Flower's Strategy interface."""
