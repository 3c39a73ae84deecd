"""A step of local training, against transformers' Trainer and TRL's SFTTrainer."""
