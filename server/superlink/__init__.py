"""The SuperLink: its process, who may connect, which code it ships. Stays at home."""
