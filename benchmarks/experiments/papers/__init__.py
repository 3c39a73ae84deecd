"""The papers' own settings, as experiments for machines with GPUs; models and data are the user's to download."""
